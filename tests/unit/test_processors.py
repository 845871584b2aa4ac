"""Parameters named after transformers' logits processors are checked where they are written."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest

from penstock.errors import RequestError
from penstock.processors import params_after
from penstock.sampling import SamplingParams


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("suppress_tokens", [-1, [-1], [1.5], ["a"], [True], "ab", 1.0, [2**70]]),
        ("begin_suppress_tokens", [[-1], {"a": 1}, object()]),
        ("min_new_tokens", [-1, 1.5, True, None]),
        ("no_repeat_ngram_size", [-1, 1.0, True, None, 10**400]),
        (
            "sequence_bias",
            [{(): 1.0}, {(1,): "x"}, {(-1,): 1.0}, {(1,): math.nan}, {(1,): 10**400}, [[1, 2.0]], 7, [[[1]]]],
        ),
        (
            "exponential_decay_length_penalty",
            [(1,), (1.5, 1.1), (1, 0), (1, -2.0), (1, math.inf), (1, 10**400), 3, "ab"],
        ),
        ("forced_bos_token_id", [-1, 1.5, "a", [1], True]),
        ("forced_eos_token_id", [-1, [], [1.5], "a", True]),
        ("renormalize_logits", [None, 2]),
        ("top_h", [0, 1.1, math.nan, "a", True]),
        ("typical_p", [0, 1.1, None, math.nan, 10**400]),
        ("epsilon_cutoff", [-0.1, 1, None, math.inf]),
        ("eta_cutoff", [-0.1, 1, None, "a"]),
    ],
)
def test_bad_values_are_refused_where_they_are_written(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: value})


def test_every_form_of_a_value_gives_the_same_parameters() -> None:
    params = SamplingParams(sequence_bias={(1, 2): 3}, forced_eos_token_id=5, suppress_tokens=None)
    assert params == SamplingParams(sequence_bias=[[[1, 2], 3.0]], forced_eos_token_id=[5], suppress_tokens=[])
    assert (params.sequence_bias, params.forced_eos_token_id, params.suppress_tokens) == ({(1, 2): 3.0}, (5,), ())
    assert replace(params, n=2) == replace(params, n=2, sequence_bias=[([1, 2], 3)])


def test_what_follows_from_the_parameters_is_kept_up_to_date() -> None:
    plain = SamplingParams(top_p=0.5, min_tokens=3)
    assert (plain.is_ruled, plain.is_cut) == (False, False)
    changed = replace(plain, suppress_tokens=[1], eta_cutoff=0.1)
    assert (changed.is_ruled, changed.is_cut) == (True, True)
    assert pickle.loads(pickle.dumps(changed)) == changed
    assert replace(changed, suppress_tokens=(), eta_cutoff=0.0) == plain
    assert not replace(changed, suppress_tokens=()).is_ruled


def test_parameters_after_a_fork_count_from_the_fork() -> None:
    """A fork is a request whose first token is not the first of the text."""
    params = SamplingParams(begin_suppress_tokens=[1], exponential_decay_length_penalty=(5, 2.0), suppress_tokens=[3])
    forked = params_after(params, 7)
    assert (forked.begin_suppress_tokens, forked.exponential_decay_length_penalty) == ((), (-2, 2.0))
    assert forked.suppress_tokens == (3,)
    assert params_after(params, 0) == params

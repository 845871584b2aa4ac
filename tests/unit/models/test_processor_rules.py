"""The rules named after transformers' logits processors agree with those, row by row, and count drafts as output."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from penstock.models.processor_rules import NGrams
from penstock.models.rules import SequenceRules, apply
from penstock.sampling import SamplingParams
from penstock.step import Row

SIZE = 40
EOS = frozenset({2, 3})
MAX_TOKENS = 6


def row_of(tokens: Sequence[int], prompt_len: int, draft: Sequence[int] = (), **params: Any) -> Row:
    end = len(tokens) + len(draft)
    wishes = SamplingParams(max_tokens=MAX_TOKENS, **params)
    return Row(0, list(tokens), end - 1, end, array("i"), True, wishes, prompt_len, draft=tuple(draft))


def logits_of(num_rows: int) -> Tensor:
    return torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(3)) * 4


def applied(logits: Tensor, *rows: Row) -> Tensor:
    logits = logits.clone()
    assert apply(logits, rows, [SequenceRules.of(row, EOS, SIZE) for row in rows]) == {}
    return logits


def by_transformers(logits: Tensor, tokens: Sequence[int], *chain: Any) -> Tensor:
    return LogitsProcessorList(chain)(torch.tensor([list(tokens)]), logits[None].clone())[0]


BIASES = [[[5], 3.0], [[5, 6], -2.0], [[9, 6], 4.0], [[1, 5, 6], 1.5], [[7, 7], 1.0]]
CASES: list[tuple[dict[str, Any], Any]] = [
    ({"suppress_tokens": [4, 5]}, lambda start: SuppressTokensLogitsProcessor([4, 5])),
    ({"begin_suppress_tokens": [4, 5]}, lambda start: SuppressTokensAtBeginLogitsProcessor([4, 5], start)),
    ({"min_new_tokens": 2}, lambda start: MinNewTokensLengthLogitsProcessor(start, 2, sorted(EOS))),
    ({"no_repeat_ngram_size": 1}, lambda start: NoRepeatNGramLogitsProcessor(1)),
    ({"no_repeat_ngram_size": 2}, lambda start: NoRepeatNGramLogitsProcessor(2)),
    ({"no_repeat_ngram_size": 4}, lambda start: NoRepeatNGramLogitsProcessor(4)),
    ({"sequence_bias": BIASES}, lambda start: SequenceBiasLogitsProcessor(BIASES)),
    ({"forced_bos_token_id": 11}, lambda start: ForcedBOSTokenLogitsProcessor(11)),
    ({"forced_eos_token_id": [2, 9]}, lambda start: ForcedEOSTokenLogitsProcessor(start + MAX_TOKENS, [2, 9])),
    (
        {"exponential_decay_length_penalty": (2, 1.5)},
        lambda start: ExponentialDecayLengthPenalty((2, 1.5), sorted(EOS), start),
    ),
]
TEXTS = [[5], [1, 5, 9], [1, 5, 1, 5, 1], [7, 7, 7, 7], [1, 5, 6, 1, 5, 6, 2, 9], list(range(9))]


@pytest.mark.parametrize(("wishes", "processor"), CASES, ids=[next(iter(wishes)) for wishes, _ in CASES])
def test_a_rule_is_that_of_transformers_with_and_without_drafts(wishes: dict[str, Any], processor: Any) -> None:
    """All texts in one batch, with and without their last tokens as drafts, and a row without rules."""
    rows, expected = [], []
    for text in TEXTS:
        for prompt_len in {1, max(1, len(text) - 3), len(text)}:
            for drafted in {0, min(2, len(text) - prompt_len)}:
                settled = len(text) - drafted
                rows.append(row_of(text[:settled], prompt_len, text[settled:], **wishes))
                expected.append((text, processor(prompt_len)))
    logits = logits_of(len(rows) + 1)
    result = applied(logits, *rows, row_of([1, 5], 1))
    for i, (text, logits_of_row) in enumerate(expected):
        assert torch.allclose(result[i], by_transformers(logits[i], text, logits_of_row), atol=1e-5), (text, rows[i])
    assert torch.equal(result[-1], logits[-1])


def test_forced_tokens_override_what_comes_before_and_suppressed_ones_stay_out() -> None:
    row = row_of([1, 4, 4, 4, 4, 4], 1, forced_eos_token_id=[2, 9], suppress_tokens=[9], bad_words=[[2]], min_tokens=6)
    result = applied(logits_of(1), row)
    assert result[0].isfinite().nonzero().tolist() == [[2]]


def test_a_decay_stays_finite() -> None:
    """1.5 to the power of a million exceeds what a float holds."""
    for factor in (1.5, 1e300, 1e-300):
        text = [1, *[4] * 5000]
        row = row_of(text, 1, exponential_decay_length_penalty=(1, factor))
        result = applied(logits_of(1), row)
        assert not result.isnan().any()
        assert result.max() < torch.inf
        assert factor < 1 or int(result.argmax()) in EOS


def test_ignored_eos_is_not_raised() -> None:
    logits = logits_of(1)
    row = row_of([1, 4, 4, 4], 1, exponential_decay_length_penalty=(0, 2.0), ignore_eos=True)
    assert torch.equal(applied(logits, row), logits)


def test_ids_outside_the_vocabulary_have_no_effect() -> None:
    logits = logits_of(1)
    wishes = {"suppress_tokens": [99], "begin_suppress_tokens": [99], "sequence_bias": {(1, 99): 2.0}}
    row = row_of([1], 1, forced_bos_token_id=99, forced_eos_token_id=99, **wishes)
    assert torch.equal(applied(logits, row), logits)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ngrams_follow_a_growing_sequence_and_forget_drafts(size: int) -> None:
    rng, text, ngrams = random.Random(size), list[int](), NGrams(size)
    for _ in range(60):
        draft = [rng.randrange(4) for _ in range(rng.randrange(4))]
        assert sorted(set(ngrams.banned(text, draft))) == banned([*text, *draft], size)
        text += [rng.randrange(4) for _ in range(rng.randrange(3))]


def banned(text: list[int], size: int) -> list[int]:
    """By its definition."""
    runs = {tuple(text[start : start + size]) for start in range(len(text) - size + 1)}
    return sorted({token for token in range(4) if (*text[len(text) - size + 1 :], token) in runs and len(text) >= size})


def test_a_sequence_that_became_shorter_is_counted_again() -> None:
    row = row_of([1, 5, 1], 1, no_repeat_ngram_size=2)
    rules = SequenceRules.of(row, EOS, SIZE)
    apply(logits_of(1), [row], [rules])
    assert rules.continues(row)
    assert not rules.continues(row_of([1, 5], 1, no_repeat_ngram_size=2))
    assert not rules.continues(row._replace(tokens=[1, 5]))

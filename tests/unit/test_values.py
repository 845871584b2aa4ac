"""Callers' numbers, flags, lists and errors become plain Python, or a `RequestError` whose message never fails."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError, RequestError, described, shown, text_of
from penstock.generation import GenerationConfig
from penstock.sampling import SamplingParams
from penstock.structured_outputs import StructuredOutputs
from penstock.values import flag, integer, items, real, text, token_ids


class Mute(Exception):
    """Neither it nor its string can be had."""

    def __str__(self) -> str:
        raise SystemExit("no")

    __repr__ = __str__


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_integers_of_numpy_and_torch_are_integers(value: Any) -> None:
    number = integer("x", value, 1, 5)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), torch.tensor(0.5)])
def test_floats_of_numpy_and_torch_are_floats(value: Any) -> None:
    number = real("x", value, 0.0, 1.0, "between 0 and 1")
    assert (number, type(number)) == (0.5, float)


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), Decimal(1), Fraction(1), 1j, "1", None, math.nan, 10**400, -(10**400), np.array([1])],
    ids=lambda value: "",
)
def test_what_no_float_holds_or_is_no_number_is_refused(value: Any) -> None:
    """10**400 was an OverflowError."""
    with pytest.raises(RequestError, match="x must be finite"):
        real("x", value, -sys.float_info.max, sys.float_info.max, "finite")
    with pytest.raises(RequestError, match="x must be an integer from 0 to 9"):
        integer("x", value, 0, 9)


def test_a_subclass_of_a_number_becomes_a_plain_number() -> None:
    class Liar(int):
        def __lt__(self, other: Any) -> bool:
            raise AssertionError("asked")

        __le__ = __gt__ = __ge__ = __eq__ = __lt__

    assert type(integer("x", Liar(3), 0, 9)) is int
    with pytest.raises(RequestError):
        integer("x", Liar(30), 0, 9)


@pytest.mark.parametrize("value", [True, 1, np.bool_(True), np.int64(1)])
def test_flags(value: Any) -> None:
    assert flag("x", value) is True
    for wrong in (2, 1.0, "true", None, []):
        with pytest.raises(RequestError, match="x must be True or False"):
            flag("x", wrong)


def test_lists_are_copied_and_endless_ones_refused() -> None:
    ids = [1, 2]
    assert items("x", ids) == (1, 2)
    assert items("x", np.array([1, 2])) == token_ids("x", torch.tensor([1, 2])) == (1, 2)
    assert items("x", None) == ()
    for wrong in ("ab", b"ab", {1: 2}, 5, itertools.count()):
        with pytest.raises(RequestError, match="x must be a list"):
            items("x", wrong)


@pytest.mark.parametrize("wrong", [[1.5], [-1], [True], [2**31], ["1"], [None], [[1]]], ids=lambda value: "")
def test_token_ids_are_integers_of_some_range(wrong: Any) -> None:
    with pytest.raises(RequestError, match="each of x must be a token id"):
        token_ids("x", wrong)


def test_a_string_becomes_a_plain_str() -> None:
    class Name(str):
        pass

    assert type(text("x", Name("a"))) is str
    with pytest.raises(RequestError, match="x must be a string"):
        text("x", b"a")


def test_errors_and_values_that_cannot_be_printed_are_named() -> None:
    """An error whose `__str__` raised ended the code that reported it."""
    assert (described(Mute()), text_of(Mute()), shown(Mute())) == ("Mute", "Mute", "<Mute>")
    assert shown(10**5000) == "<int>"
    assert described(ValueError("no")) == "ValueError: no"
    assert (described(KeyError()), text_of(SystemExit())) == ("KeyError", "SystemExit")
    assert len(text_of(ValueError("x" * 10**6))) < 3000


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"length_penalty": 400}, "length_penalty must be a number from -32 to 32, got 400"),
        ({"length_penalty": -400.0}, "length_penalty"),
        ({"repetition_penalty": 1e9}, "repetition_penalty must be a number from 0.001 to 1000"),
        ({"temperature": 10**400}, "temperature must be a finite number >= 0"),
        ({"logit_bias": {1: 10**400}}, "each value of logit_bias"),
        ({"allowed_token_ids": [1.5]}, "each of allowed_token_ids must be a token id"),
        ({"allowed_token_ids": [-1]}, "each of allowed_token_ids"),
        ({"stop_token_ids": [-1]}, "each of stop_token_ids"),
        ({"bad_words": "word"}, "bad_words must be a list"),
        ({"seed": 2**64}, "seed must be None or an integer of 64 bits"),
        ({"n": 10**5000}, "n must be an integer >= 1, got <int>"),
        ({"ignore_eos": "yes"}, "ignore_eos must be True or False"),
    ],
)
def test_parameters_that_would_fail_later_are_refused_where_they_are_written(values: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        SamplingParams(**values)


def test_parameters_are_kept_as_plain_numbers_and_copies() -> None:
    bias, allowed = {np.int64(3): np.float32(0.5)}, np.array([1, 2])
    params = SamplingParams(
        temperature=np.float32(0.5),
        max_tokens=np.int64(4),
        logit_bias=bias,
        allowed_token_ids=allowed,  # type: ignore[arg-type]
    )
    bias.clear()
    allowed[:] = 9
    assert (type(params.temperature), type(params.max_tokens)) == (float, int)
    assert (params.logit_bias, params.allowed_token_ids) == ({3: 0.5}, (1, 2))


def test_any_top_k_beyond_a_vocabulary_is_the_same() -> None:
    assert SamplingParams(top_k=sys.maxsize) == SamplingParams(top_k=10**100)


@pytest.mark.parametrize(
    "values",
    [{"max_length": "x"}, {"max_length": 10**5000}, {"num_beams": 1.5}, {"do_sample": "no"}, {"eos_token_id": [1.5]}],
    ids=lambda value: "",
)
def test_a_generation_config_is_as_strict(values: Any) -> None:
    with pytest.raises(RequestError, match="must be"):
        GenerationConfig(**values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch_size", True),
        ("max_queue_size", Decimal(3)),
        ("max_queue_size", 10**400),
        ("max_queue_size", 10**5000),
        ("batch_timeout_ms", math.inf),
        ("batch_timeout_ms", 1e300),
        ("priority_boost_threshold", 1e-320),
        ("swap_space", Fraction(1, 2)),
    ],
    ids=lambda value: "",
)
def test_settings_that_cannot_be_represented_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        EngineConfig(**{name: value})


def test_settings_may_be_numbers_of_numpy() -> None:
    config = EngineConfig(max_batch_size=np.int64(3), gc_threshold=np.float32(0.5))
    assert (config.max_batch_size, config.gc_threshold) == (3, 0.5)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (
            lambda: SamplingParams(tempature=1),
            "SamplingParams has no parameter 'tempature': did you mean 'temperature'?",
        ),  # type: ignore[call-arg]
        (
            lambda: GenerationConfig(max_lenght=1),
            "GenerationConfig has no parameter 'max_lenght': did you mean 'max_length'?",
        ),  # type: ignore[call-arg]
        (lambda: StructuredOutputs(xyz=1), "StructuredOutputs has no parameter 'xyz'"),  # type: ignore[call-arg]
    ],
)
def test_an_unknown_keyword_is_answered_with_the_nearest_known_one(
    construct: Callable[[], object], message: str
) -> None:
    with pytest.raises(TypeError) as caught:
        construct()
    assert str(caught.value) == message

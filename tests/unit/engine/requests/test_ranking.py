"""How completions are ranked, and the thread that runs a caller's own function."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from penstock.engine.requests.ranking import likelihood, scores_of
from penstock.errors import RequestError
from penstock.outputs import CompletionOutput
from penstock.sampling import SamplingParams

LONG = CompletionOutput(text="long", token_ids=[1, 2, 3, 4], cumulative_logprob=-4.0, sampled_logprobs=[-0.5] * 4)
SHORT = CompletionOutput(text="short", token_ids=[1], cumulative_logprob=-2.0, sampled_logprobs=[-3.0])


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, (-4.0, -2.0)),
        ({"rank_by": "cumulative_logprob"}, (-4.0, -2.0)),
        ({"rank_by": "normalized_logprob"}, (-1.0, -2.0)),
        ({"rank_by": "normalized_logprob", "length_penalty": 2.0}, (-0.25, -2.0)),
        ({"rank_by": "normalized_logprob", "length_penalty": 0.0}, (-4.0, -2.0)),
        ({"use_beam_search": True, "best_of": 2, "temperature": 0.0}, (-0.5, -3.0)),
    ],
)
def test_likelihood_is_a_sum_or_what_is_left_of_it_after_the_length(
    options: dict[str, Any], scores: tuple[float, float]
) -> None:
    params = SamplingParams(**options)
    assert (likelihood(params, LONG), likelihood(params, SHORT)) == scores


def test_a_completion_without_tokens_is_the_last() -> None:
    assert likelihood(SamplingParams(), CompletionOutput()) == -math.inf


def test_a_function_of_the_callers_runs_on_a_thread_of_its_own() -> None:
    names = []

    def length(output: CompletionOutput) -> int:
        names.append(threading.current_thread().name)
        return len(output.text)

    assert scores_of(length, [LONG, SHORT]).result(10) == [4.0, 5.0]
    assert set(names) == {"penstock-ranking"}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda output: 1 / 0, "rank_by failed: ZeroDivisionError"),
        (lambda output: None, "rank_by failed: TypeError"),
        (lambda output: math.nan, "returned nan for completion 0"),
    ],
)
def test_what_such_a_function_does_wrong_is_a_request_error(function: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        scores_of(function, [LONG]).result(10)


def test_an_error_that_cannot_be_printed_is_a_request_error_too() -> None:
    """The thread ended while it formatted the error, and the request never ended."""

    class Mute(BaseException):
        def __str__(self) -> str:
            raise SystemExit(3)

    def fail(output: CompletionOutput) -> float:
        raise Mute

    with pytest.raises(RequestError, match="rank_by failed: Mute"):
        scores_of(fail, [LONG]).result(10)

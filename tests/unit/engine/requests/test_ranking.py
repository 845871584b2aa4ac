"""How completions are ranked, and the thread that runs a caller's own function."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from penstock.engine.requests.ranking import consensus, likelihood, scores_of
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


def completions(*texts: list[int]) -> list[CompletionOutput]:
    return [CompletionOutput(index=index, token_ids=tokens) for index, tokens in enumerate(texts)]


def test_consensus_is_what_a_completion_has_in_common_with_the_others() -> None:
    """Pairs with a start: 0-1, 1-2, 2-3. The second shares all three with the first, and one with the third."""
    outputs = completions([1, 2, 3], [1, 2, 3], [1, 5], [7, 8, 9])
    first, second, third, fourth = consensus(outputs)
    assert first == second == pytest.approx(2 * (3 + 1 + 0) / 3 / (3 + (3 + 2 + 3) / 3))
    assert third == pytest.approx(2 * 2 / 3 / (2 + 9 / 3))
    assert fourth == 0.0


def test_consensus_of_equal_completions_is_one_and_of_none_zero() -> None:
    assert consensus(completions([1, 2], [1, 2])) == [1.0, 1.0]
    assert consensus(completions([1, 2])) == [0.0]
    assert consensus(completions([], [])) == [0.0, 0.0]


def test_consensus_does_not_prefer_short_completions() -> None:
    """A start that all share scores less than a whole text that most share."""
    outputs = completions([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5, 8], [1])
    assert max(range(4), key=consensus(outputs).__getitem__) == 0


def test_consensus_is_found_beside_the_engine() -> None:
    assert scores_of("consensus", completions([1], [1])).result(10) == [1.0, 1.0]

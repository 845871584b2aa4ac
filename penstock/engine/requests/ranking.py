"""Scores of completions: their likelihood, or the result of a caller's function.

A caller's function runs on a thread of its own: it may be slow, and an exception in it ends only its request. Called by
`Collector`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from penstock.errors import RequestError, described
from penstock.outputs import CompletionOutput
from penstock.sampling import RankFunction, SamplingParams


def likelihood(params: SamplingParams, output: CompletionOutput) -> float:
    """The score of a completion without a caller's function; minus infinity if it has no tokens."""
    if not output.token_ids:
        return -math.inf
    total = sum(output.sampled_logprobs) if params.use_beam_search else output.cumulative_logprob
    if params.use_beam_search or params.rank_by == "normalized_logprob":
        return float(total / len(output.token_ids) ** params.length_penalty)
    return total


def scores_of(scorer: RankFunction, outputs: Iterable[CompletionOutput]) -> Future[list[float]]:
    """The scores that `scorer` returns, or its exception as a `RequestError`."""
    future: Future[list[float]] = Future()

    def run() -> None:
        try:
            future.set_result([_score(scorer, output) for output in outputs])
        except BaseException as error:
            future.set_exception(RequestError(f"rank_by failed: {described(error)}"))

    threading.Thread(target=run, name="penstock-ranking", daemon=True).start()
    return future


def _score(scorer: RankFunction, output: CompletionOutput) -> float:
    score = float(scorer(output))
    if math.isnan(score):
        raise ValueError(f"it returned {score} for completion {output.index}")
    return score

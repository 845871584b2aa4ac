"""Scores of completions: their likelihood, their agreement, or the result of a caller's function.

What may be slow runs on a thread of its own, and an exception in a caller's function ends only its request. Called by
`Collector`.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
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


def consensus(outputs: Sequence[CompletionOutput]) -> list[float]:
    """How much each completion has in common with the others, from 0 (nothing) to 1 (it equals all of them).

    The expected Dice coefficient of its pairs of adjacent tokens and those of another completion, as in minimum Bayes
    risk decoding (Kumar and Byrne, 2004); the mean size of the others stands for the size of each. Linear in tokens.
    """
    pair_sets = [set(zip([None, *output.token_ids], output.token_ids, strict=False)) for output in outputs]
    counts = Counter(pair for pairs in pair_sets for pair in pairs)
    num_others, total = max(1, len(outputs) - 1), sum(map(len, pair_sets))
    overlaps = [sum(counts[pair] - 1 for pair in pairs) / num_others for pairs in pair_sets]
    sizes = [len(pairs) + (total - len(pairs)) / num_others for pairs in pair_sets]
    return [2 * overlap / size if size else 0.0 for overlap, size in zip(overlaps, sizes, strict=True)]


def scores_of(rank_by: RankFunction | str, outputs: Sequence[CompletionOutput]) -> Future[list[float]]:
    """The scores by a caller's function or by `consensus`; the function's exception as a `RequestError`."""
    future: Future[list[float]] = Future()

    def run() -> None:
        try:
            if isinstance(rank_by, str):
                future.set_result(consensus(outputs))
            else:
                future.set_result([_score(rank_by, output) for output in outputs])
        except BaseException as error:
            future.set_exception(RequestError(f"rank_by failed: {described(error)}"))

    threading.Thread(target=run, name="penstock-ranking", daemon=True).start()
    return future


def _score(scorer: RankFunction, output: CompletionOutput) -> float:
    score = float(scorer(output))
    if math.isnan(score):
        raise ValueError(f"it returned {score} for completion {output.index}")
    return score

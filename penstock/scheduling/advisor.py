"""`BatchingOptimizer`: what was measured of batches, and what follows from it for the settings.

Owns the latest batches: steps of an engine, or those that a program records. Changes no setting and never advises what
it did not measure. Written by one thread, the engine's or the program's; asked from any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from penstock.config import BatchingStrategy
from penstock.errors import RequestError
from penstock.scheduling.limits import Limits
from penstock.step import StepRecord

WINDOW = 1000
ENOUGH = 10  # batches of a strategy that are worth a comparison
MUCH = 0.3  # share of batches that makes something worth saying
LOW_EFFICIENCY = 0.8
HIGH_MEMORY = 0.9


class Suggestion(str):
    """A sentence that says what to change and why; `figures` are the numbers in it."""

    figures: Mapping[str, float]

    def __new__(cls, text: str, **figures: float) -> Self:
        self = super().__new__(cls, text.format(**figures))
        self.figures = figures
        return self


class Batch(NamedTuple):
    """One batch. `computed` counts padding too; `memory` is as its recorder counts it.

    Of an engine's step: `limit` is the most sequences that could run, `most_rows` what settings allow of them, `target`
    the tuner's goal, and `shortages` how often a sequence gave way since the step before because blocks lacked.
    """

    strategy: str
    rows: int
    tokens: int
    computed: int
    seconds: float
    memory: float = 0.0
    limit: int = 0
    most_rows: int = 0
    target: str | None = None
    waiting: int = 0
    prompt_tokens: int = 0
    shortages: int = 0


class BatchingOptimizer:
    """Keeps the last `WINDOW` batches. An engine records every step in its own: `engine.batching_optimizer`."""

    def __init__(self) -> None:
        self._ring: list[Batch] = []
        self._count = 0
        self._num_shortages = 0

    def record_batch(self, batch_info: Mapping[str, Any], processing_time: float, memory_usage: float = 0.0) -> None:
        """Record one batch as `DynamicBatcher.get_next_batch` describes it, the seconds it took, and its memory.

        Of `batch_info` are read: strategy, batch_size, lengths or total_tokens, max_length, efficiency. `memory_usage`
        is a fraction, or bytes; only batches in the same unit are compared. Raises `RequestError` without a time.
        """
        if not processing_time > 0:
            raise RequestError(f"processing_time must be the seconds that the batch took, got {processing_time!r}")
        rows, longest = int(batch_info.get("batch_size", 0)), int(batch_info.get("max_length", 0))
        padded = rows * longest
        known = batch_info.get("total_tokens", sum(batch_info.get("lengths", ())))
        tokens = int(known or padded * batch_info.get("efficiency", 1.0))
        computed = round(tokens / batch_info["efficiency"]) if batch_info.get("efficiency") else max(tokens, padded)
        strategy = str(batch_info.get("strategy", "unknown"))
        self._add(Batch(strategy, rows, tokens, computed, processing_time, memory_usage))

    def record_step(self, record: StepRecord, strategy: str, limits: Limits, num_shortages: int) -> None:
        """Record one step of an engine; `num_shortages` is how often, since its start, one gave way to get blocks."""
        since, self._num_shortages = num_shortages - self._num_shortages, num_shortages
        self._add(
            Batch(
                strategy=str(strategy),
                rows=record.rows,
                tokens=record.tokens,
                computed=record.tokens,
                seconds=record.seconds,
                limit=limits.max_running,
                most_rows=limits.max_batch_size,
                target=limits.target,
                waiting=record.waiting,
                prompt_tokens=record.prompt_tokens,
                shortages=since,
            )
        )

    def get_best_strategy(self) -> str:
        """The strategy with the most tokens per second; continuous while nothing was recorded."""
        return _best(_by_strategy(self._ring[:]))

    def get_recommendations(self) -> dict[str, Any]:
        """What to change: always `best_strategy` and `suggestions`, and the figures that they rest on.

        `best_strategy` has the most tokens per second of those that were measured, which `basis` tells in words and
        `strategies` in numbers, of each: batches, tokens_per_second, mean_seconds, mean_batch_size, efficiency (the
        share of computed tokens that were no padding), max_memory. Each of `suggestions` is a string with `figures`.
        """
        batches = self._ring[:]
        strategies = _by_strategy(batches)
        return {
            "best_strategy": _best(strategies),
            "basis": _basis(strategies),
            "samples": len(batches),
            "strategies": strategies,
            "suggestions": suggestions(batches),
        }

    def _add(self, batch: Batch) -> None:
        if len(self._ring) < WINDOW:
            self._ring.append(batch)
        else:
            self._ring[self._count % WINDOW] = batch
        self._count += 1


def _by_strategy(batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[Batch]] = {}
    for batch in batches:
        groups.setdefault(batch.strategy, []).append(batch)
    return {strategy: _figures(group) for strategy, group in groups.items()}


def _figures(batches: Sequence[Batch]) -> dict[str, float]:
    seconds, tokens = sum(batch.seconds for batch in batches), sum(batch.tokens for batch in batches)
    return {
        "batches": len(batches),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "mean_seconds": seconds / len(batches),
        "mean_batch_size": sum(batch.rows for batch in batches) / len(batches),
        "efficiency": tokens / max(1, sum(batch.computed for batch in batches)),
        "max_memory": max(batch.memory for batch in batches),
    }


def _best(strategies: Mapping[str, Mapping[str, float]]) -> str:
    """By tokens per second alone: a rate and a size have no common unit. Strategies seldom tried come last."""
    if not strategies:
        return BatchingStrategy.CONTINUOUS.value
    return max(
        strategies, key=lambda name: (strategies[name]["batches"] >= ENOUGH, strategies[name]["tokens_per_second"])
    )


def _basis(strategies: Mapping[str, Mapping[str, float]]) -> str:
    if not strategies:
        return "no batch was recorded yet: continuous is the default, not a finding"
    rates = "; ".join(
        f"{name}: {figures['tokens_per_second']:,.1f} tokens/s over {figures['batches']:.0f} batches"
        for name, figures in strategies.items()
    )
    alone = " (no other strategy was measured)" if len(strategies) == 1 else ""
    few = (
        f" (fewer than {ENOUGH} batches say little)" if any(f["batches"] < ENOUGH for f in strategies.values()) else ""
    )
    return rates + alone + few


# Suggestions: one rule each, None where it has nothing to say.


def suggestions(batches: Sequence[Batch]) -> list[Suggestion]:
    """What the batches call for, most urgent first."""
    if len(batches) < ENOUGH:
        text = "Record more batches: {samples} are too few to advise anything; {enough} are the least."
        return [Suggestion(text, samples=len(batches), enough=ENOUGH)]
    found = (memory(batches), shortage(batches), full(batches), static(batches))
    return [suggestion for suggestion in (*found, padding(batches), stalls(batches)) if suggestion is not None]


def memory(batches: Sequence[Batch]) -> Suggestion | None:
    """Memory that is nearly used up, where it was recorded as a fraction."""
    most = max(batch.memory for batch in batches)
    if not HIGH_MEMORY < most <= 1:
        return None
    text = "Lower max_batch_size or max_sequence_length: memory use reached {memory:.0%}."
    return Suggestion(text, memory=most)


def shortage(batches: Sequence[Batch]) -> Suggestion | None:
    """Work thrown away because the cache was full."""
    count = sum(batch.shortages for batch in batches)
    if not count:
        return None
    text = (
        "Raise memory_pool_size, or set batching_strategy='memory_aware', which starts only what fits to its end: "
        "in {batches} batches, sequences were sent back to the queue {preemptions} times because blocks lacked."
    )
    return Suggestion(text, preemptions=count, batches=len(batches))


def full(batches: Sequence[Batch]) -> Suggestion | None:
    """A setting that others wait behind, not what the tuner makes of it."""
    tight = [batch for batch in batches if batch.waiting and batch.rows >= batch.most_rows > 0]
    share = len(tight) / len(batches)
    if share < MUCH:
        return None
    waiting = sum(batch.waiting for batch in tight) / len(tight)
    by_itself = "" if tight[-1].target else ", or set target='throughput', which finds it"
    text = (
        f"Raise max_batch_size above {{limit}}{by_itself}: {{share:.0%}} of {{batches}} "
        "batches were full while {waiting:.1f} sequences waited."
    )
    return Suggestion(text, limit=tight[-1].most_rows, share=share, batches=len(batches), waiting=waiting)


def static(batches: Sequence[Batch]) -> Suggestion | None:
    """Places that a static batch leaves empty."""
    idle = [batch for batch in batches if batch.strategy == "naive" and batch.waiting and batch.rows < batch.limit]
    share = len(idle) / len(batches)
    if share < MUCH:
        return None
    places = sum(batch.limit - batch.rows for batch in idle) / len(idle)
    text = (
        "Use continuous batching: in {share:.0%} of {batches} batches {places:.1f} places stayed empty while "
        "sequences waited for the batch to end."
    )
    return Suggestion(text, share=share, batches=len(batches), places=places)


def padding(batches: Sequence[Batch]) -> Suggestion | None:
    """Tokens computed for nothing."""
    figures = _figures(batches)
    if figures["efficiency"] >= LOW_EFFICIENCY:
        return None
    text = (
        "Group similar lengths (strategy BUCKETED, or a smaller bucket_size): {waste:.0%} of the computed tokens of "
        "{batches} batches were padding."
    )
    return Suggestion(text, waste=1 - figures["efficiency"], batches=len(batches))


def stalls(batches: Sequence[Batch]) -> Suggestion | None:
    """Streams that wait for prompts computed beside them, where nobody declared what matters more."""
    if batches[-1].target:
        return None
    mixed = [batch.seconds for batch in batches if 0 < batch.prompt_tokens < batch.tokens]
    plain = [batch.seconds for batch in batches if batch.limit and not batch.prompt_tokens]
    if min(len(mixed), len(plain)) < ENOUGH:
        return None
    mixed_ms, plain_ms = (1000 * sum(seconds) / len(seconds) for seconds in (mixed, plain))
    if mixed_ms < 4 * plain_ms:
        return None
    text = (
        "If streams should not stall, lower max_num_batched_tokens or set target='latency': steps that also compute "
        "prompts take {mixed_ms:.0f} ms, others {plain_ms:.0f} ms."
    )
    return Suggestion(text, mixed_ms=mixed_ms, plain_ms=plain_ms)

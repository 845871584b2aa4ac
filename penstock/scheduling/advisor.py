"""`BatchingOptimizer`: what was measured of batches, and which settings that suggests to change.

Owns the latest batches: steps of an engine, or those that a program records. Changes no setting and never advises what
it did not measure. Written by one thread, the engine's or the program's; read from any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypedDict

from penstock.config import BatchingStrategy
from penstock.errors import RequestError
from penstock.scheduling.limits import StepLimits
from penstock.step import StepRecord

WINDOW = 1000
MIN_BATCHES = 10  # of a strategy, before it is compared or anything is advised
MIN_SHARE = 0.3  # share of the batches that a condition must hold for
LOW_EFFICIENCY = 0.8
HIGH_MEMORY = 0.9
HIGH_STALL = 4  # times the duration of a step without prompts


class Suggestion(str):
    """A sentence that says what to change and why; `figures` are the numbers in it."""

    figures: Mapping[str, float]

    def __new__(cls, text: str, **figures: float) -> Self:
        self = super().__new__(cls, text.format(**figures))
        self.figures = figures
        return self


class Figures(TypedDict):
    """Totals and means of the batches of one strategy."""

    batches: int
    tokens_per_second: float
    mean_seconds: float
    mean_batch_size: float
    efficiency: float
    max_memory: float


class Recommendations(TypedDict):
    """What `BatchingOptimizer.get_recommendations` returns."""

    best_strategy: str
    basis: str
    samples: int
    strategies: dict[str, Figures]
    suggestions: list[Suggestion]


class Batch(NamedTuple):
    """One batch. `computed` counts padding too; `memory` is in the unit of the program that recorded it.

    Of an engine's step: `limit` is how many sequences could run, `max_rows` how many the settings allow, `target` the
    tuner's goal, and `shortages` how many sequences were preempted for want of blocks since the step before.
    """

    strategy: str
    rows: int
    tokens: int
    computed: int
    seconds: float
    memory: float = 0.0
    limit: int = 0
    max_rows: int = 0
    target: str | None = None
    waiting: int = 0
    prompt_tokens: int = 0
    shortages: int = 0


class BatchingOptimizer:
    """Keeps the last `WINDOW` batches. An engine records every step: `engine.batching_optimizer`."""

    def __init__(self) -> None:
        self._ring: list[Batch] = []
        self._count = 0
        self._num_shortages = 0

    def record_batch(self, batch_info: Mapping[str, Any], processing_time: float, memory_usage: float = 0.0) -> None:
        """Record one batch as `DynamicBatcher.get_next_batch` describes it, the seconds it took, and its memory.

        The keys read from `batch_info` are strategy, batch_size, lengths or total_tokens, max_length and efficiency.
        `memory_usage` is a fraction, or bytes; only batches in the same unit are compared. Raises `RequestError`
        without a time.
        """
        if not processing_time > 0:
            raise RequestError(f"processing_time must be the seconds that the batch took, got {processing_time!r}")
        rows, longest = int(batch_info.get("batch_size", 0)), int(batch_info.get("max_length", 0))
        num_padded, efficiency = rows * longest, batch_info.get("efficiency")
        total_tokens = batch_info.get("total_tokens", sum(batch_info.get("lengths", ())))
        tokens = int(total_tokens or num_padded * (1.0 if efficiency is None else efficiency))
        computed = round(tokens / efficiency) if efficiency else max(tokens, num_padded)
        strategy = str(batch_info.get("strategy", "unknown"))
        self._add(Batch(strategy, rows, tokens, computed, processing_time, memory_usage))

    def record_step(self, record: StepRecord, strategy: str, limits: StepLimits, num_shortages: int) -> None:
        """Record one step of an engine; `num_shortages` counts the preemptions for want of blocks since its start."""
        shortages, self._num_shortages = num_shortages - self._num_shortages, num_shortages
        self._add(
            Batch(
                strategy=str(strategy),
                rows=record.rows,
                tokens=record.tokens,
                computed=record.tokens,
                seconds=record.seconds,
                limit=limits.max_running,
                max_rows=limits.max_batch_size,
                target=limits.target,
                waiting=record.waiting,
                prompt_tokens=record.prompt_tokens,
                shortages=shortages,
            )
        )

    def get_best_strategy(self) -> str:
        """The strategy with the most tokens per second; continuous if nothing was recorded."""
        return _best(_by_strategy(self._ring[:]))

    def get_recommendations(self) -> Recommendations:
        """What to change: always `best_strategy` and `suggestions`, and the measurements behind them.

        `best_strategy` has the most tokens per second of the strategies that were measured. `basis` gives the reason in
        words, `strategies` in numbers for each strategy: batches, tokens_per_second, mean_seconds, mean_batch_size,
        efficiency (the share of computed tokens that were not padding), max_memory. Each of `suggestions` is a string
        with `figures`.
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


def _by_strategy(batches: Iterable[Batch]) -> dict[str, Figures]:
    groups: dict[str, list[Batch]] = {}
    for batch in batches:
        groups.setdefault(batch.strategy, []).append(batch)
    return {strategy: _figures(group) for strategy, group in groups.items()}


def _figures(batches: Sequence[Batch]) -> Figures:
    seconds, tokens = sum(batch.seconds for batch in batches), sum(batch.tokens for batch in batches)
    return {
        "batches": len(batches),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "mean_seconds": seconds / len(batches),
        "mean_batch_size": sum(batch.rows for batch in batches) / len(batches),
        "efficiency": tokens / max(1, sum(batch.computed for batch in batches)),
        "max_memory": max(batch.memory for batch in batches),
    }


def _best(strategies: Mapping[str, Figures]) -> str:
    """By tokens per second alone, after strategies with enough batches."""
    if not strategies:
        return BatchingStrategy.CONTINUOUS.value

    def key(name: str) -> tuple[bool, float]:
        return strategies[name]["batches"] >= MIN_BATCHES, strategies[name]["tokens_per_second"]

    return max(strategies, key=key)


def _basis(strategies: Mapping[str, Figures]) -> str:
    if not strategies:
        return "no batch was recorded yet: continuous is the default, not a measurement"
    rates = "; ".join(
        f"{name}: {figures['tokens_per_second']:,.1f} tokens/s over {figures['batches']} batches"
        for name, figures in strategies.items()
    )
    has_few = any(figures["batches"] < MIN_BATCHES for figures in strategies.values())
    alone = " (no other strategy was measured)" if len(strategies) == 1 else ""
    uncertainty = f" (fewer than {MIN_BATCHES} batches are not conclusive)" if has_few else ""
    return rates + alone + uncertainty


# Suggestions: one function per rule, None where the rule does not apply.


def suggestions(batches: Sequence[Batch]) -> list[Suggestion]:
    """What the batches suggest to change, most urgent first."""
    if len(batches) < MIN_BATCHES:
        text = "Record more batches: advice needs at least {minimum}, and {samples} were recorded."
        return [Suggestion(text, samples=len(batches), minimum=MIN_BATCHES)]
    rules = (memory, shortage, full, static, padding, stalls)
    return [suggestion for suggestion in (rule(batches) for rule in rules) if suggestion is not None]


def memory(batches: Sequence[Batch]) -> Suggestion | None:
    """Memory that is nearly used up, where it was recorded as a fraction."""
    peak = max(batch.memory for batch in batches)
    if not HIGH_MEMORY < peak <= 1:
        return None
    return Suggestion("Lower max_batch_size or max_sequence_length: memory use reached {memory:.0%}.", memory=peak)


def shortage(batches: Sequence[Batch]) -> Suggestion | None:
    """Work that was thrown away because the K/V cache was full."""
    count = sum(batch.shortages for batch in batches)
    if not count:
        return None
    text = (
        "Raise memory_pool_size, or set batching_strategy='memory_aware', which starts only requests that fit until "
        "they end: in {batches} batches, sequences were preempted {preemptions} times because the K/V cache was full."
    )
    return Suggestion(text, preemptions=count, batches=len(batches))


def full(batches: Sequence[Batch]) -> Suggestion | None:
    """A setting that makes others wait; not a limit of the tuner."""
    full_batches = [batch for batch in batches if batch.waiting and batch.rows >= batch.max_rows > 0]
    share = len(full_batches) / len(batches)
    if share < MIN_SHARE:
        return None
    waiting = sum(batch.waiting for batch in full_batches) / len(full_batches)
    latest = full_batches[-1]
    alternative = "" if latest.target else ", or set target='throughput', which tunes it"
    text = (
        f"Raise max_batch_size above {{limit}}{alternative}: {{share:.0%}} of {{batches}} "
        "batches were full while {waiting:.1f} sequences waited."
    )
    return Suggestion(text, limit=latest.max_rows, share=share, batches=len(batches), waiting=waiting)


def static(batches: Sequence[Batch]) -> Suggestion | None:
    """Rows that a static batch leaves empty."""
    idle = [batch for batch in batches if batch.strategy == "naive" and batch.waiting and batch.rows < batch.limit]
    share = len(idle) / len(batches)
    if share < MIN_SHARE:
        return None
    places = sum(batch.limit - batch.rows for batch in idle) / len(idle)
    text = (
        "Use continuous batching: in {share:.0%} of {batches} batches {places:.1f} places stayed empty while "
        "sequences waited for the batch to end."
    )
    return Suggestion(text, share=share, batches=len(batches), places=places)


def padding(batches: Sequence[Batch]) -> Suggestion | None:
    """Computed tokens that were padding."""
    figures = _figures(batches)
    if figures["efficiency"] >= LOW_EFFICIENCY:
        return None
    text = (
        "Group similar lengths (strategy BUCKETED, or a smaller bucket_size): {waste:.0%} of the computed tokens of "
        "{batches} batches were padding."
    )
    return Suggestion(text, waste=1 - figures["efficiency"], batches=len(batches))


def stalls(batches: Sequence[Batch]) -> Suggestion | None:
    """Streams that wait for prompts computed in the same step, unless a target declares what matters more."""
    if batches[-1].target:
        return None
    mixed = [batch.seconds for batch in batches if 0 < batch.prompt_tokens < batch.tokens]
    plain = [batch.seconds for batch in batches if batch.limit and not batch.prompt_tokens]
    if min(len(mixed), len(plain)) < MIN_BATCHES:
        return None
    mixed_ms, plain_ms = (1000 * sum(seconds) / len(seconds) for seconds in (mixed, plain))
    if mixed_ms < HIGH_STALL * plain_ms:
        return None
    text = (
        "If streams should not stall, lower max_num_batched_tokens or set target='latency': steps that also compute "
        "prompts take {mixed_ms:.0f} ms, others {plain_ms:.0f} ms."
    )
    return Suggestion(text, mixed_ms=mixed_ms, plain_ms=plain_ms)

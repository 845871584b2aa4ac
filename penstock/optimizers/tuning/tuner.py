"""The tuner: computes the limits of the next steps from a window of step records, toward a declared goal.

Owns the rules by which chunk budget, batch limit, draft length and coalescing wait follow step costs. Pure functions:
no clock, no state; a request's sampling parameters are never touched. Called by the engine, every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple, TypeVar

from penstock.config import EngineConfig
from penstock.optimizers.tuning.step_costs import MIN_S, StepCosts, costs_of
from penstock.step import StepRecord

# Where a setting was left at its default, throughput may raise it up to these.
OPEN_TOKENS, OPEN_ROWS = 4096, 256
# Where latency starts, before any measurement: low, because a sequence that was started cannot be taken back.
FIRST_CHUNK, FIRST_ROWS = 8, 4
AIM = 0.95  # of the bound; the remainder is a reserve for what no record predicts
UNREACHABLE_FACTOR = 1.5  # times the time of one stream, where even that exceeds the bound
MIN_CHUNK = 4  # prompt tokens that every step may have beside its streams, bound or not: prompts must progress
GROWTH = 1.5  # the most that a limit grows at once: costs are known near the sizes that were tried, not far from them
FALL, RISE = 0.85, 1.25  # a limit that would fall or rise by less stays as it is
WORTH, WORSE = 1.02, 0.95  # relative tokens per second at which a larger step is worth it, or not worth keeping
MAX_ACCEPTANCE = 0.8  # of a draft token, at best; the speculation controller knows the measured rates
LONG_WAIT = 48  # steps after which one waiting sequence is started, bound or not
MIN_RECORDS = 4  # of steps of one size, for their rate to count
RECENT = 16  # records that show the demand
# An idle engine waits for the rest of a burst for this fraction of a step: later arrivals only join one step later.
WAIT_FRACTION = {"latency": 0.1, "throughput": 1.0}

UNBOUNDED = 1 << 30
LIMITS = ("chunk_tokens", "alone_tokens", "max_batch_size", "draft_length", "batch_timeout_ms")
N = TypeVar("N", int, float)


class Ceilings(NamedTuple):
    """The values that tuning never exceeds."""

    max_num_batched_tokens: int
    max_batch_size: int
    draft_length: int
    batch_timeout_ms: float


class TunedLimits(NamedTuple):
    """The limits in force.

    `chunk_tokens` of prompts go into a step beside its streams, fewer where their time by `prompt_s`, `token_s` and
    `depth_s` (see `StepCosts`) would exceed `spare_s`, and none into a `probe`; with or without streams a step has up
    to `alone_tokens` in all. `max_batch_size` sequences run, a draft has `draft_length` tokens, an idle engine waits
    `batch_timeout_ms` for a burst.
    """

    chunk_tokens: int
    alone_tokens: int
    max_batch_size: int
    draft_length: int
    batch_timeout_ms: float
    spare_s: float = math.inf
    prompt_s: float = 0.0
    token_s: float = 0.0
    depth_s: float = 0.0
    probe: bool = False
    reason: str = "nothing was measured yet"

    def step_tokens(self, stream_tokens: int, depth: int) -> int:
        """Most tokens of a step with `stream_tokens`, drafts included, if its first prompt is at position `depth`."""
        if not stream_tokens:
            return self.alone_tokens
        if self.probe:
            return stream_tokens
        left_s, token_s = self.spare_s - self.prompt_s * depth, self.token_s + self.depth_s * depth
        chunk = self.chunk_tokens if self.chunk_tokens * token_s <= left_s else int(left_s / max(token_s, MIN_S))
        return stream_tokens + max(MIN_CHUNK, min(chunk, self.alone_tokens - stream_tokens))


def ceilings(config: EngineConfig) -> Ceilings:
    """The settings themselves; for throughput, those left at their defaults may be exceeded."""
    explicit = config.model_fields_set if config.target == "throughput" else EngineConfig.model_fields
    tokens, rows = config.max_num_batched_tokens, config.max_batch_size
    return Ceilings(
        tokens if "max_num_batched_tokens" in explicit else max(tokens, OPEN_TOKENS),
        rows if "max_batch_size" in explicit else max(rows, OPEN_ROWS),
        config.speculation_length,
        config.batch_timeout_ms,
    )


def initial_limits(config: EngineConfig) -> TunedLimits:
    """Where tuning starts."""
    tokens, rows = config.max_num_batched_tokens, config.max_batch_size
    chunk = tokens
    if config.target == "latency":
        chunk, rows = min(FIRST_CHUNK, tokens), min(FIRST_ROWS, rows)
    return TunedLimits(chunk, tokens, rows, config.speculation_length, config.batch_timeout_ms)


def tune(
    records: Sequence[StepRecord], current: TunedLimits, config: EngineConfig, scatter: Iterable[float] = ()
) -> TunedLimits:
    """The limits to follow `current`, by `records`, oldest first, and the `scatter` of `StepWindow`."""
    if not records:
        return current
    costs = costs_of(records, scatter)
    if config.target == "throughput":
        return for_throughput(records, costs, current, config)
    return current if costs is None else for_latency(records, costs, current, config)


def steady(current: N, proposed: N) -> N:
    """`proposed`, or `current` where the two hardly differ, so that noise changes nothing."""
    return current if FALL * current <= proposed <= RISE * current else proposed


def limits_of(tuned: TunedLimits) -> dict[str, int | float]:
    """The limits by name, without the costs they follow from."""
    return {name: getattr(tuned, name) for name in LIMITS}


def for_latency(
    records: Sequence[StepRecord], costs: StepCosts, current: TunedLimits, config: EngineConfig
) -> TunedLimits:
    """As many prompt tokens and streams as the bound on the time between tokens has time for."""
    upper, token_s = ceilings(config), costs.token_s
    aim_s, reason = time_aim(config.max_inter_token_ms / 1000, costs)
    spare_s = aim_s - costs.streams_s
    affordable = spare_s / token_s if token_s > 0 else math.inf
    chunk = clamp(affordable, MIN_CHUNK, max(current.chunk_tokens, GROWTH * costs.max_prompt_tokens))
    rows = max(steady(current.max_batch_size, rows_within(spare_s, costs, current)), rows_to_unblock(records))
    draft = min(upper.draft_length, worthwhile_draft(costs), draft_within(spare_s, costs))
    return TunedLimits(
        chunk_tokens=steady(current.chunk_tokens, min(chunk, upper.max_num_batched_tokens)),
        alone_tokens=upper.max_num_batched_tokens,
        max_batch_size=min(rows, upper.max_batch_size),
        draft_length=steady(current.draft_length, draft),
        batch_timeout_ms=steady(current.batch_timeout_ms, wait_ms(records, "latency", upper.batch_timeout_ms)),
        spare_s=spare_s,
        prompt_s=costs.prompt_s,
        token_s=token_s,
        depth_s=costs.depth_s,
        reason=reason,
    )


def time_aim(bound_s: float, costs: StepCosts) -> tuple[float, str]:
    """How long a step may take by the modelled costs, and why.

    If even a single stream exceeds the bound, restricting everything else would not keep it: steps may then take a
    little longer than that stream alone.
    """
    alone_s = costs.streams_s - costs.stream_s * (costs.streams - 1)
    aim_s = AIM * bound_s / costs.noise
    token_ms, deep_ms, prompt_ms = (1000 * s for s in (costs.token_s, costs.token_at(1000), 1000 * costs.prompt_s))
    reason = (
        f"{costs.streams:g} streams take {1000 * costs.streams_s:.1f} ms, a prompt token {token_ms:.2f} ms "
        f"({deep_ms:.2f} ms at position 1,000), reading 1,000 cached tokens {prompt_ms:.1f} ms; "
    )
    if alone_s <= aim_s:
        return aim_s, f"{reason}steps take up to {costs.noise:.2f} times as long, the bound is {1000 * bound_s:g} ms"
    return UNREACHABLE_FACTOR * alone_s, f"{reason}a single stream exceeds the bound of {1000 * bound_s:g} ms"


def rows_within(spare_s: float, costs: StepCosts, current: TunedLimits) -> int:
    """How many streams take `spare_s` more than the current ones; not many more than were tried."""
    more = spare_s / costs.stream_s if costs.stream_s > 0 else math.inf
    return clamp(costs.streams + more, 1, max(current.max_batch_size, math.ceil(GROWTH * costs.max_streams)))


def rows_to_unblock(records: Sequence[StepRecord]) -> int:
    """One row more than are running if a sequence waited for long and no prompt was computed meanwhile; else 0.

    Streams may run for ever, and the bound must not keep all others out: they are started one at a time.
    """
    latest = records[-LONG_WAIT:]
    is_stuck = len(latest) == LONG_WAIT and all(record.waiting and not record.prompt_tokens for record in latest)
    return latest[-1].rows + 1 if is_stuck else 0


def draft_within(spare_s: float, costs: StepCosts) -> int:
    """The draft length that `spare_s` pays for, beside the streams' current drafts and a minimal chunk."""
    if costs.token_s <= 0:
        return UNBOUNDED
    tokens = spare_s / costs.token_s + costs.drafted - MIN_CHUNK
    return max(0, int(tokens / costs.streams))


def worthwhile_draft(costs: StepCosts) -> int:
    """The longest draft whose last token pays for itself at the acceptance rate `MAX_ACCEPTANCE`.

    A token beside the streams costs `token_s` and saves one stream its share of a step, with the probability that it
    and those before it are accepted.
    """
    share_s = costs.streams_s / max(1.0, costs.streams)
    if costs.token_s <= 0 or share_s <= 0:
        return UNBOUNDED
    return max(0, math.floor(math.log(min(1.0, costs.token_s / share_s)) / math.log(MAX_ACCEPTANCE)))


def wait_ms(records: Sequence[StepRecord], target: str, max_ms: float) -> float:
    """The fraction of a typical step for which an idle engine waits."""
    return min(max_ms, round(1000 * WAIT_FRACTION[target] * median(record.seconds for record in records), 1))


def clamp(value: float, low: int, high: float) -> int:
    """An integer between both; `low` wins where they contradict."""
    return max(low, int(min(value, high)))


def for_throughput(
    records: Sequence[StepRecord], costs: StepCosts | None, current: TunedLimits, config: EngineConfig
) -> TunedLimits:
    """Larger steps and batches while there is demand and they make more tokens per second; smaller ones otherwise."""
    upper = ceilings(config)
    recent = records[-RECENT:]
    tokens, token_rates = larger_while_faster(
        current.alone_tokens,
        [(record.tokens, record.tokens, record.seconds) for record in records if record.prompt_tokens],
        sum(record.tokens >= 0.9 * current.alone_tokens for record in recent) > len(recent) / 2,
    )
    rows, row_rates = larger_while_faster(
        current.max_batch_size,
        [(record.streams, record.generated, record.seconds) for record in records if not record.prompt_tokens],
        sum(record.waiting > 0 and record.rows >= 0.9 * current.max_batch_size for record in recent) > len(recent) / 2,
    )
    tokens = min(tokens, upper.max_num_batched_tokens)
    return TunedLimits(
        chunk_tokens=tokens,
        alone_tokens=tokens,
        max_batch_size=min(rows, upper.max_batch_size),
        draft_length=min(upper.draft_length, worthwhile_draft(costs)) if costs else current.draft_length,
        batch_timeout_ms=steady(current.batch_timeout_ms, wait_ms(records, "throughput", upper.batch_timeout_ms)),
        reason=f"rates by tokens per step: {token_rates}; by streams per step: {row_rates}",
    )


def larger_while_faster(size: int, steps: Sequence[tuple[int, int, float]], is_in_demand: bool) -> tuple[int, str]:
    """The size to follow `size`, and the rates that led to it.

    `steps` are (size, tokens, seconds) of each. Sizes are compared by powers of two: the size doubles if it
    `is_in_demand` and steps of this size were faster than those of half of it; it returns to a smaller one that was
    faster.
    """
    rates = rates_by_power(steps)
    report = ", ".join(f"{rate:,.0f}/s up to {1 << power}" for power, rate in sorted(rates.items())) or "none yet"
    current = (size - 1).bit_length()
    if current not in rates:
        return size, report
    best = max(rates, key=lambda power: rates[power])
    if rates[current] < WORSE * rates[best]:
        return 1 << best, report
    is_worth = rates[current] >= WORTH * rates.get(current - 1, 0.0) and current + 1 not in rates
    return (2 * size if is_in_demand and is_worth else size), report


def rates_by_power(steps: Sequence[tuple[int, int, float]]) -> dict[int, float]:
    """Tokens per second of steps whose size is above half of a power of two and not above it, by that power."""
    totals: dict[int, tuple[int, int, float]] = {}
    for size, tokens, seconds in steps:
        power = (size - 1).bit_length()
        count, total_tokens, total_s = totals.get(power, (0, 0, 0.0))
        totals[power] = count + 1, total_tokens + tokens, total_s + seconds
    return {
        power: tokens / seconds
        for power, (count, tokens, seconds) in totals.items()
        if count >= MIN_RECORDS and seconds > 0
    }

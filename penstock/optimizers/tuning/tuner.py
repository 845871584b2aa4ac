"""The tuner: from a window of step records to the limits of the next steps, toward a declared goal. Pure functions.

Owns the rules by which chunk budget, batch limit, draft length and coalescing wait follow what steps cost. Asks no
clock, keeps no state, touches no request's sampling parameters. Called by the engine, every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

from penstock.config import EngineConfig
from penstock.optimizers.tuning.step_costs import LEAST_S, Costs, costs_of
from penstock.step import StepRecord

# Where a setting was not given, throughput may go up to here.
OPEN_TOKENS, OPEN_ROWS = 4096, 256
# Where latency begins, before anything was measured: low, because what has started cannot be taken back.
FIRST_CHUNK, FIRST_ROWS = 8, 4
AIM = 0.95  # of the bound: the rest is for what no record foretold
BEYOND_REACH = 1.5  # times what one stream alone takes, where that is above the bound already
MIN_CHUNK = 4  # tokens beside streams that every step may have, bound or not: prompts must get somewhere
GROWTH = 1.5  # most that a limit grows at once: costs are known near what was tried, not far from it
FALL, RISE = 0.85, 1.25  # a limit that falls or rises by less stays as it was
WORTH, WORSE = 1.02, 0.95  # so many times the tokens per second make a larger step worth it, or not worth keeping
KEPT_CHANCE = 0.8  # that a drafted token is accepted, at best; the drafter itself knows the real chance
LONG_WAIT = 48  # steps after which one of those who wait is let in, bound or not
FEW = 4  # records that say something about steps of their size
RECENT = 16  # records that say what is in demand
# An idle engine waits for the rest of a burst for this part of a step: what comes later only joins one step later.
WAIT_SHARE = {"latency": 0.1, "throughput": 1.0}

UNBOUNDED = 1 << 30
LIMITS = ("chunk_tokens", "alone_tokens", "max_batch_size", "draft_length", "batch_timeout_ms")
N = TypeVar("N", int, float)


class Ceilings(NamedTuple):
    """What no tuning exceeds."""

    max_num_batched_tokens: int
    max_batch_size: int
    draft_length: int
    batch_timeout_ms: float


class Tuned(NamedTuple):
    """Limits that were found.

    `chunk_tokens` of prompts go into a step beside its streams, as far as `spare_s` lasts at what `Costs` says of
    `prompt_s`, `token_s` and `depth_s`, and none at all into a `probe`; with streams or without, a step has up to
    `alone_tokens` in all. `max_batch_size` sequences run, a draft has `draft_length` tokens, an idle engine waits
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
        """Most tokens of a step whose streams, drafts included, have so many, when its first prompt is at `depth`."""
        if not stream_tokens:
            return self.alone_tokens
        if self.probe:
            return stream_tokens
        left_s, token_s = self.spare_s - self.prompt_s * depth, self.token_s + self.depth_s * depth
        chunk = self.chunk_tokens if self.chunk_tokens * token_s <= left_s else int(left_s / max(token_s, LEAST_S))
        return stream_tokens + max(MIN_CHUNK, min(chunk, self.alone_tokens - stream_tokens))


def ceilings(config: EngineConfig) -> Ceilings:
    """The settings themselves; toward throughput, those that nobody gave are open."""
    given = config.model_fields_set if config.target == "throughput" else EngineConfig.model_fields
    tokens, rows = config.max_num_batched_tokens, config.max_batch_size
    return Ceilings(
        tokens if "max_num_batched_tokens" in given else max(tokens, OPEN_TOKENS),
        rows if "max_batch_size" in given else max(rows, OPEN_ROWS),
        config.speculation_length,
        config.batch_timeout_ms,
    )


def first(config: EngineConfig) -> Tuned:
    """Where tuning begins."""
    tokens, rows = config.max_num_batched_tokens, config.max_batch_size
    chunk = tokens
    if config.target == "latency":
        chunk, rows = min(FIRST_CHUNK, tokens), min(FIRST_ROWS, rows)
    return Tuned(chunk, tokens, rows, config.speculation_length, config.batch_timeout_ms)


def tune(records: Sequence[StepRecord], now: Tuned, config: EngineConfig, scatter: Iterable[float] = ()) -> Tuned:
    """The limits that `records`, oldest first, call for after `now`; `scatter` as `Window` has it."""
    if not records:
        return now
    costs = costs_of(records, scatter)
    if config.target == "throughput":
        return for_throughput(records, costs, now, config)
    return now if costs is None else for_latency(records, costs, now, config)


def steady(before: N, after: N) -> N:
    """`after`, or `before` where that hardly differs, so that noise changes nothing."""
    return before if FALL * before <= after <= RISE * before else after


def limits_of(tuned: Tuned) -> dict[str, Any]:
    """The limits by name, without what they rest on."""
    fields = tuned._asdict()
    return {name: fields[name] for name in LIMITS}


def for_latency(records: Sequence[StepRecord], costs: Costs, now: Tuned, config: EngineConfig) -> Tuned:
    """As much beside the streams, and as many streams, as the bound on the time between tokens has time for."""
    top, token_s = ceilings(config), costs.token_s
    aim_s, why = aimed_at(config.max_inter_token_ms / 1000, costs)
    spare_s = aim_s - costs.streams_s
    affordable = spare_s / token_s if token_s > 0 else math.inf
    chunk = clamp(affordable, MIN_CHUNK, max(now.chunk_tokens, GROWTH * costs.most_beside))
    rows = max(steady(now.max_batch_size, rows_within(spare_s, costs, now)), rows_for_those_who_wait(records))
    draft = min(top.draft_length, worthwhile_draft(costs), draft_within(spare_s, costs))
    return Tuned(
        chunk_tokens=steady(now.chunk_tokens, min(chunk, top.max_num_batched_tokens)),
        alone_tokens=top.max_num_batched_tokens,
        max_batch_size=min(rows, top.max_batch_size),
        draft_length=steady(now.draft_length, draft),
        batch_timeout_ms=steady(now.batch_timeout_ms, wait_ms(records, "latency", top.batch_timeout_ms)),
        spare_s=spare_s,
        prompt_s=costs.prompt_s,
        token_s=token_s,
        depth_s=costs.depth_s,
        reason=why,
    )


def aimed_at(bound_s: float, costs: Costs) -> tuple[float, str]:
    """How long a step may take by what `costs` say, and why.

    Where not even one stream alone stays below the bound, giving up everything else would not keep it either: steps
    may then take a little longer than that one stream.
    """
    alone_s = costs.streams_s - costs.stream_s * (costs.streams - 1)
    aim_s = AIM * bound_s / costs.noise
    token_ms, deep_ms, prompt_ms = (1000 * s for s in (costs.token_s, costs.token_at(1000), 1000 * costs.prompt_s))
    why = (
        f"{costs.streams:g} streams take {1000 * costs.streams_s:.1f} ms, a prompt token {token_ms:.2f}, "
        f"1,000 tokens deep {deep_ms:.2f}, and such a prompt {prompt_ms:.1f}; "
    )
    if alone_s <= aim_s:
        return aim_s, f"{why}{costs.noise:.2f} times that at most, of {1000 * bound_s:g}"
    return BEYOND_REACH * alone_s, f"{why}the bound of {1000 * bound_s:g} cannot be kept by one stream alone"


def rows_within(spare_s: float, costs: Costs, now: Tuned) -> int:
    """How many streams take `spare_s` more than those there are; few more than were tried."""
    more = spare_s / costs.stream_s if costs.stream_s > 0 else math.inf
    return clamp(costs.streams + more, 1, max(now.max_batch_size, math.ceil(GROWTH * costs.most_streams)))


def rows_for_those_who_wait(records: Sequence[StepRecord]) -> int:
    """One more than run, where somebody waited for long and no prompt was computed meanwhile; else 0.

    Streams may go on for ever, and the bound must not keep everybody else out: one at a time is let in.
    """
    latest = records[-LONG_WAIT:]
    is_stuck = len(latest) == LONG_WAIT and all(record.waiting and not record.prompt_tokens for record in latest)
    return latest[-1].rows + 1 if is_stuck else 0


def draft_within(spare_s: float, costs: Costs) -> int:
    """How long drafts may be for `spare_s` to pay for them, besides those that the streams have, and a least chunk."""
    if costs.token_s <= 0:
        return UNBOUNDED
    tokens = spare_s / costs.token_s + costs.drafted - MIN_CHUNK
    return max(0, int(tokens / costs.streams))


def worthwhile_draft(costs: Costs) -> int:
    """The longest draft whose last token pays, if all before it were accepted.

    A token beside the streams costs `token_s` and saves one stream its share of a step, with the chance that it and
    those before it are accepted.
    """
    share_s = costs.streams_s / max(1.0, costs.streams)
    if costs.token_s <= 0 or share_s <= 0:
        return UNBOUNDED
    return max(0, math.floor(math.log(min(1.0, costs.token_s / share_s)) / math.log(KEPT_CHANCE)))


def wait_ms(records: Sequence[StepRecord], target: str, most_ms: float) -> float:
    """A part of a usual step."""
    return min(most_ms, round(1000 * WAIT_SHARE[target] * median(record.seconds for record in records), 1))


def clamp(value: float, low: int, high: float) -> int:
    """An integer between both; the lower one counts more."""
    return max(low, int(min(value, high)))


def for_throughput(records: Sequence[StepRecord], costs: Costs | None, now: Tuned, config: EngineConfig) -> Tuned:
    """Larger steps and batches while they are asked for and make more tokens per second; back when they do not."""
    top = ceilings(config)
    recent = records[-RECENT:]
    tokens, why_tokens = larger_while_faster(
        now.alone_tokens,
        [(record.tokens, record.tokens, record.seconds) for record in records if record.prompt_tokens],
        sum(record.tokens >= 0.9 * now.alone_tokens for record in recent) > len(recent) / 2,
    )
    rows, why_rows = larger_while_faster(
        now.max_batch_size,
        [(record.streams, record.generated, record.seconds) for record in records if not record.prompt_tokens],
        sum(record.waiting > 0 and record.rows >= 0.9 * now.max_batch_size for record in recent) > len(recent) / 2,
    )
    tokens = min(tokens, top.max_num_batched_tokens)
    return Tuned(
        chunk_tokens=tokens,
        alone_tokens=tokens,
        max_batch_size=min(rows, top.max_batch_size),
        draft_length=min(top.draft_length, worthwhile_draft(costs)) if costs else now.draft_length,
        batch_timeout_ms=steady(now.batch_timeout_ms, wait_ms(records, "throughput", top.batch_timeout_ms)),
        reason=f"steps by tokens: {why_tokens}; by streams: {why_rows}",
    )


def larger_while_faster(size: int, steps: Sequence[tuple[int, int, float]], is_wanted: bool) -> tuple[int, str]:
    """The size to go on with after `size`, and the rates that it rests on.

    `steps` are (size, amount made, seconds) of each. Sizes are compared by powers of two: twice the size where
    `is_wanted` and steps of this one were faster than those of half of it; back to a smaller one that was faster.
    """
    rates = rates_by_power(steps)
    told = ", ".join(f"{rate:,.0f}/s up to {1 << power}" for power, rate in sorted(rates.items())) or "none yet"
    here = (size - 1).bit_length()
    if here not in rates:
        return size, told
    best = max(rates, key=lambda power: rates[power])
    if rates[here] < WORSE * rates[best]:
        return 1 << best, told
    is_worth = rates[here] >= WORTH * rates.get(here - 1, 0.0) and here + 1 not in rates
    return (2 * size if is_wanted and is_worth else size), told


def rates_by_power(steps: Sequence[tuple[int, int, float]]) -> dict[int, float]:
    """Amount per second of steps whose size is above half of a power of two and not above it, by that power."""
    found: dict[int, tuple[int, int, float]] = {}
    for size, amount, seconds in steps:
        count, made, took = found.get((size - 1).bit_length(), (0, 0, 0.0))
        found[(size - 1).bit_length()] = count + 1, made + amount, took + seconds
    return {power: made / took for power, (count, made, took) in found.items() if count >= FEW and took > 0}

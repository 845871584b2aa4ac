"""From records to limits: pure functions, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.config import EngineConfig
from penstock.optimizers.tuning.step_costs import costs_of
from penstock.optimizers.tuning.tuner import (
    AIM,
    FIRST_CHUNK,
    FIRST_ROWS,
    MIN_CHUNK,
    TunedLimits,
    ceilings,
    initial_limits,
    larger_while_faster,
    limits_of,
    steady,
    tune,
    worthwhile_draft,
)
from penstock.step import StepRecord
from tests.unit.optimizers.tuning.test_step_costs import step

LATENCY = EngineConfig(target="latency", max_inter_token_ms=60, speculation_length=4)


def throughput(**settings: Any) -> EngineConfig:
    return EngineConfig(target="throughput", **settings)


def many(*records: StepRecord, times: int = 8) -> list[StepRecord]:
    return list(records) * times


def settled(records: list[StepRecord], config: EngineConfig, times: int = 20) -> TunedLimits:
    """Where the limits end up when steps go on to cost the same."""
    tuned = initial_limits(config)
    for _ in range(times):
        tuned = tune(records, tuned, config)
    return tuned


# For latency.


def test_latency_starts_low() -> None:
    assert limits_of(initial_limits(LATENCY)) == {
        "chunk_tokens": FIRST_CHUNK,
        "alone_tokens": 512,
        "max_batch_size": FIRST_ROWS,
        "draft_length": 4,
        "batch_timeout_ms": 50.0,
    }


def test_without_records_nothing_changes() -> None:
    tuned = initial_limits(LATENCY)
    assert tune([], tuned, LATENCY) is tuned
    assert tune([step(0, 512)], tuned, LATENCY) == tuned, "a prompt alone says nothing about streams"


def test_chunk_fills_the_time_that_streams_leave() -> None:
    """33 ms of 57 go to 4 streams. The rest pays for 48 tokens at half a millisecond; deep in a prompt for fewer."""
    tuned = settled(many(step(3), step(4), step(4, 40), step(4, 40, 1000), step(4, 20, 500)), LATENCY)
    assert AIM == 0.95
    assert tuned.spare_s == pytest.approx(0.024, rel=0.01)
    assert tuned.step_tokens(4, depth=0) == pytest.approx(4 + 0.024 / 0.0005, abs=1)
    assert tuned.step_tokens(4, depth=1000) == pytest.approx(4 + (0.024 - 0.005) / 0.001, abs=1)
    assert tuned.reason.startswith("4 streams take 33.0 ms, a prompt token 0.50 ms (1.00 ms at position 1,000), ")


def test_chunk_grows_only_a_little_beyond_what_was_tried() -> None:
    tuned = tune(many(step(3), step(4), step(4, 8)), initial_limits(LATENCY), LATENCY)
    assert tuned.chunk_tokens == 12
    tuned = tune(many(step(3), step(4), step(4, 12)), tuned, LATENCY)
    assert tuned.chunk_tokens == 18


def test_without_a_stream_a_prompt_has_the_whole_step() -> None:
    tuned = settled(many(step(3), step(4), step(4, 40)), LATENCY)
    assert tuned.step_tokens(0, depth=0) == 512


def test_chunk_shrinks_at_once_when_steps_take_longer() -> None:
    cheap = settled(many(step(3), step(4), step(4, 40)), LATENCY)
    dear = tune(many(step(3), step(4), step(4, 40, noise=1.5)), cheap, LATENCY)
    assert dear.step_tokens(4, 0) < cheap.step_tokens(4, 0) * 0.6


def test_prompts_progress_where_the_bound_cannot_be_kept() -> None:
    tuned = settled(many(step(20), step(30), step(30, 40)), LATENCY)
    assert tuned.step_tokens(30, depth=0) == 30 + MIN_CHUNK
    assert tuned.draft_length == 0


def test_a_bound_below_one_stream_leaves_time_for_the_others() -> None:
    """27 ms of one stream are above a bound of 20: steps may take half as much again, 40.5 ms."""
    hopeless = EngineConfig(target="latency", max_inter_token_ms=20)
    tuned = settled(many(step(3), step(4), step(4, 10)), hopeless)
    assert tuned.spare_s == pytest.approx(1.5 * 0.027 - 0.033)
    assert "a single stream exceeds the bound of 20 ms" in tuned.reason


def test_as_many_streams_start_as_the_bound_allows() -> None:
    """25 ms and 2 for each, of 57 ms."""
    tuned = settled(many(step(10), step(12), step(12, 10)), LATENCY)
    assert tuned.max_batch_size in (15, 16)
    crowded = settled(many(step(20), step(30), step(30, 10)), LATENCY)
    assert crowded.max_batch_size in (15, 16), "those that run go on; no others start"


def test_streams_that_never_end_do_not_keep_others_out() -> None:
    """The bound leaves no room for a third; after 48 steps of waiting one is let in, but none beside its prompt."""
    full = EngineConfig(target="latency", max_inter_token_ms=30)
    crowd = step(2)._replace(waiting=3)
    assert settled([crowd] * 47, full).max_batch_size <= 2
    assert settled([crowd] * 48, full).max_batch_size == 3
    assert settled([*[crowd] * 60, step(2, 4)._replace(waiting=2)], full).max_batch_size <= 2
    crowd = step(20)._replace(waiting=3)
    assert settled([crowd] * 48, full).max_batch_size == 21


def test_streams_are_added_a_few_at_a_time() -> None:
    """One more than was ever tried is taken to cost a quarter of a step."""
    tight = EngineConfig(target="latency", max_inter_token_ms=42)
    assert tune(many(step(4)), initial_limits(tight), tight).max_batch_size == FIRST_ROWS
    assert tune(many(step(3), step(4)), initial_limits(tight), tight).max_batch_size == 6
    assert tune(many(step(3), step(4)), initial_limits(LATENCY), LATENCY).max_batch_size == 6, (
        "though there is time for 15"
    )


def test_settings_stay_limits() -> None:
    config = EngineConfig(target="latency", max_batch_size=3, max_num_batched_tokens=16, max_inter_token_ms=1000)
    tuned = settled(many(step(2), step(3), step(3, 200)), config)
    assert (tuned.chunk_tokens, tuned.alone_tokens, tuned.max_batch_size) == (16, 16, 3)


def test_a_noisy_window_changes_nothing() -> None:
    tuned = settled(many(step(3), step(4), step(4, 40)), LATENCY)
    again = tune(many(step(3), step(4), step(4, 40, noise=1.01)), tuned, LATENCY)
    assert limits_of(again) == limits_of(tuned)
    assert [steady(100, after) for after in (125, 126, 85, 84)] == [100, 126, 100, 84]


def test_an_idle_engine_waits_a_part_of_a_step() -> None:
    assert settled(many(step(4)), LATENCY).batch_timeout_ms == pytest.approx(3.3)
    assert settled(many(step(4)), throughput()).batch_timeout_ms == pytest.approx(33.0)
    assert settled(many(step(4)), EngineConfig(target="latency", batch_timeout_ms=0)).batch_timeout_ms == 0


def test_the_same_records_give_the_same_limits() -> None:
    records = many(step(3), step(4), step(4, 40), step(4, 20, 700))
    assert settled(records, LATENCY) == settled(list(records), LATENCY)


# Drafts.


def test_a_draft_ends_with_the_last_token_that_pays() -> None:
    """A stream's share of 33 ms is 8.25; a token beside it costs 0.5, a sixteenth, and 0.8**12 is still more."""
    costs = costs_of(many(step(3), step(4), step(4, 10)))
    assert costs is not None
    assert worthwhile_draft(costs) == 12
    assert settled(many(step(3), step(4), step(4, 10)), throughput(speculation_length=4)).draft_length == 4


def test_full_batches_do_not_draft() -> None:
    heavy = [StepRecord(0.1, 100, 100, 100, 0, 0.0, 100, 0), StepRecord(0.2, 100, 100, 200, 100, 0.0, 100, 0)]
    assert settled(many(*heavy), throughput()).draft_length == 0


def test_drafts_are_short_where_the_bound_is_tight() -> None:
    """33 ms of 4 streams, of 38: 10 tokens at half a millisecond are left, 4 of them for prompts, 1 for each stream."""
    tight = EngineConfig(target="latency", max_inter_token_ms=40)
    assert settled(many(step(3), step(4), step(4, 10)), tight).draft_length == 1


# For throughput.


def prompts(tokens: int, rate: float) -> StepRecord:
    """A step of a prompt at so many tokens per second."""
    return StepRecord(tokens / rate, 1, 0, tokens, tokens, 0.0, 0, 0)


def decodes(rows: int, rate: float, waiting: int = 9) -> StepRecord:
    """A step of streams at so many tokens per second, with others waiting."""
    return StepRecord(rows / rate, rows, rows, rows, 0, 0.0, rows, waiting)


def test_default_settings_may_be_exceeded_for_throughput() -> None:
    assert ceilings(throughput())[:2] == (4096, 256)
    assert ceilings(throughput(max_batch_size=8, max_num_batched_tokens=100))[:2] == (100, 8)
    assert ceilings(LATENCY)[:2] == (512, 32)


def test_steps_double_while_they_are_full_and_faster() -> None:
    tuned = tune([prompts(256, 700.0)] * 8 + [prompts(512, 800.0)] * 16, initial_limits(throughput()), throughput())
    assert (tuned.chunk_tokens, tuned.alone_tokens) == (1024, 1024)
    tuned = tune([prompts(512, 800.0)] * 8 + [prompts(1024, 801.0)] * 16, tuned, throughput())
    assert tuned.chunk_tokens == 1024, "as fast is no reason to go on"
    assert "800/s up to 512, 801/s up to 1024" in tuned.reason


def test_steps_go_back_to_a_size_that_was_faster() -> None:
    tuned = initial_limits(throughput())._replace(chunk_tokens=1024, alone_tokens=1024)
    tuned = tune([prompts(512, 800.0)] * 8 + [prompts(1024, 600.0)] * 16, tuned, throughput())
    assert tuned.chunk_tokens == 512
    assert tune([prompts(512, 800.0)] * 8 + [prompts(1024, 600.0)] * 8, tuned, throughput()).chunk_tokens == 512


def test_steps_that_are_not_full_do_not_grow() -> None:
    assert tune([prompts(300, 800.0)] * 16, initial_limits(throughput()), throughput()).chunk_tokens == 512


def test_the_batch_doubles_while_others_wait_and_it_is_faster() -> None:
    tuned = tune([decodes(16, 180.0)] * 8 + [decodes(32, 240.0)] * 16, initial_limits(throughput()), throughput())
    assert tuned.max_batch_size == 64
    assert tune([decodes(32, 240.0, waiting=0)] * 16, initial_limits(throughput()), throughput()).max_batch_size == 32
    assert (
        tune([decodes(32, 240.0)] * 16, initial_limits(throughput()), throughput(max_batch_size=40)).max_batch_size
        == 40
    )


def test_sizes_are_compared_by_powers_of_two() -> None:
    steps = [(30, 30, 0.1)] * 4 + [(60, 60, 0.25)] * 4 + [(8, 8, 0.001)] * 3
    assert larger_while_faster(64, steps, is_in_demand=True)[0] == 32
    assert larger_while_faster(32, steps, is_in_demand=True)[0] == 32, "64 is known to be slower"
    assert larger_while_faster(128, steps, is_in_demand=True)[0] == 128, "nothing is known of it yet"
    assert larger_while_faster(32, [], is_in_demand=True) == (32, "none yet")

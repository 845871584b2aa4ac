"""What follows from measured batches, and that nothing follows from none."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import BatchingConfig, BatchingOptimizer, DynamicBatcher
from penstock.config import EngineConfig
from penstock.errors import RequestError
from penstock.optimizers.tuning.tuner import initial_limits
from penstock.scheduling.advisor import WINDOW, Batch, full
from penstock.scheduling.limits import Limits, StepLimits
from penstock.step import StepRecord
from tests.unit.scheduling.world import HIGH, World


def record(**fields: Any) -> StepRecord:
    """A step of 4 streams that took 10 ms."""
    values = {"seconds": 0.01, "rows": 4, "streams": 4, "tokens": 4, "prompt_tokens": 0, "depth": 0.0, "generated": 4}
    return StepRecord(**{**values, "waiting": 0, **fields})


def limits(max_batch_size: int = 32, target: str | None = None, tuned: int = 32) -> StepLimits:
    """Limits in in_force: of the settings, or what a tuner made of them."""
    current = Limits(EngineConfig(max_batch_size=max_batch_size, target=target))
    if target:
        current.tuned = initial_limits(EngineConfig(target=target))._replace(max_batch_size=tuned)
    return current.resolve()


def advised(
    count: int = 20, in_force: StepLimits | None = None, shortages: int = 0, strategy: str = "continuous", **fields: Any
) -> Any:
    """Suggestions after so many equal steps."""
    optimizer = BatchingOptimizer()
    for _ in range(count):
        optimizer.record_step(record(**fields), strategy, in_force or limits(), shortages)
    return optimizer.get_recommendations()["suggestions"]


def test_without_samples_it_says_so() -> None:
    """004-85: fewer than ten gave a message in place of the two keys."""
    recommendations = BatchingOptimizer().get_recommendations()
    assert recommendations["best_strategy"] == "continuous"
    assert recommendations["samples"] == 0
    assert "no batch was recorded" in recommendations["basis"]
    assert [str(text) for text in recommendations["suggestions"]] == [
        "Record more batches: advice needs at least 10, and 0 were recorded."
    ]


def test_best_strategy_makes_the_most_tokens_per_second() -> None:
    """004-86: the score added 1/seconds and 1/bytes."""
    optimizer = BatchingOptimizer()
    for _ in range(10):
        optimizer.record_batch(
            {"strategy": "naive", "batch_size": 4, "max_length": 100, "lengths": [100, 10, 10, 10]}, 0.1, 10
        )
        optimizer.record_batch(
            {"strategy": "bucketed", "batch_size": 2, "max_length": 10, "lengths": [10, 9]}, 0.01, 1e9
        )
    recommendations = optimizer.get_recommendations()
    assert recommendations["best_strategy"] == optimizer.get_best_strategy() == "bucketed"
    assert (
        recommendations["basis"]
        == "naive: 1,300.0 tokens/s over 10 batches; bucketed: 1,900.0 tokens/s over 10 batches"
    )
    assert recommendations["strategies"]["naive"] == {
        "batches": 10,
        "tokens_per_second": pytest.approx(1300),
        "mean_seconds": pytest.approx(0.1),
        "mean_batch_size": 4,
        "efficiency": pytest.approx(130 / 400),
        "max_memory": 10,
    }


def test_a_strategy_tried_once_does_not_win_by_luck() -> None:
    optimizer = BatchingOptimizer()
    for _ in range(10):
        optimizer.record_batch({"strategy": "naive", "batch_size": 1, "max_length": 10}, 0.1)
    optimizer.record_batch({"strategy": "bucketed", "batch_size": 1, "max_length": 10}, 0.001)
    assert optimizer.get_best_strategy() == "naive"
    assert "fewer than 10 batches are not conclusive" in optimizer.get_recommendations()["basis"]


def test_a_strategy_that_was_not_compared_says_so() -> None:
    optimizer = BatchingOptimizer()
    for _ in range(10):
        optimizer.record_batch({"strategy": "naive", "batch_size": 1, "max_length": 10}, 0.1)
    basis = "naive: 100.0 tokens/s over 10 batches (no other strategy was measured)"
    assert optimizer.get_recommendations()["basis"] == basis


def test_it_reads_what_a_batcher_says() -> None:
    batcher, optimizer = DynamicBatcher(BatchingConfig(strategy="bucketed", bucket_size=5)), BatchingOptimizer()
    batcher.add_items([(str(i), 5 + i) for i in range(6)])
    batch, info = batcher.get_next_batch()
    optimizer.record_batch(info, processing_time=0.5)
    figures = optimizer.get_recommendations()["strategies"]["bucketed"]
    assert figures["tokens_per_second"] == pytest.approx(sum(range(5, 11)) / 0.5)
    assert figures["efficiency"] == pytest.approx(info["efficiency"])
    assert len(batch) == 6


def test_a_batch_without_a_time_is_refused() -> None:
    with pytest.raises(RequestError, match="processing_time"):
        BatchingOptimizer().record_batch({}, 0.0)


def test_only_the_latest_batches_count() -> None:
    optimizer = BatchingOptimizer()
    for i in range(WINDOW + 5):
        optimizer.record_batch({"strategy": "naive" if i < 5 else "bucketed", "batch_size": 1, "max_length": 1}, 1.0)
    assert set(optimizer.get_recommendations()["strategies"]) == {"bucketed"}


def test_all_is_well() -> None:
    assert advised() == []


def test_full_batches_with_others_waiting_call_for_a_higher_limit() -> None:
    (suggestion,) = advised(in_force=limits(4), waiting=6)
    assert suggestion == (
        "Raise max_batch_size above 4, or set target='throughput', which tunes it: 100% of 20 batches were full "
        "while 6.0 sequences waited."
    )
    assert suggestion.figures == {"limit": 4, "share": 1.0, "batches": 20, "waiting": 6.0}


@pytest.mark.parametrize(("count", "is_advised"), [(5, False), (6, True)])
def test_three_full_batches_of_ten_are_worth_saying(count: int, is_advised: bool) -> None:
    tight = Batch("continuous", rows=4, tokens=4, computed=4, seconds=0.01, waiting=6, max_rows=4)
    assert (full([tight] * count + [tight._replace(rows=3)] * (20 - count)) is not None) is is_advised


def test_batches_without_a_limit_are_never_full() -> None:
    """Those that a program records name none."""
    batch = Batch("naive", rows=4, tokens=4, computed=4, seconds=0.01, waiting=6)
    assert full([batch] * 20) is None
    assert full([batch._replace(max_rows=1)] * 20) is not None


def test_preemptions_call_for_memory() -> None:
    (suggestion,) = advised(shortages=3)
    assert "memory_aware" in suggestion
    assert suggestion.figures == {"preemptions": 3, "batches": 20}


def test_only_what_lacked_in_the_latest_batches_calls_for_memory() -> None:
    optimizer, in_force = BatchingOptimizer(), limits()
    for _ in range(WINDOW + 1):
        optimizer.record_step(record(), "continuous", in_force, 3)
    assert optimizer.get_recommendations()["suggestions"] == []
    optimizer.record_step(record(), "continuous", in_force, 5)
    (suggestion,) = optimizer.get_recommendations()["suggestions"]
    assert suggestion.figures["preemptions"] == 2


def test_who_gave_way_to_a_higher_class_did_not_lack_memory() -> None:
    world = World(max_batch_size=1)
    world.add(1, 3)
    world.step()
    world.add(2, 3, priority=HIGH)
    world.drain()
    assert (world.scheduler.stats()["num_preemptions"], world.scheduler.num_shortages) == (1, 0)
    world = World(num_blocks=4, caching=False)
    world.add(1, 4, new=8)
    world.add(2, 4, new=8)
    world.drain()
    assert world.scheduler.stats()["num_preemptions"] == world.scheduler.num_shortages > 0


def test_a_limit_of_the_tuner_is_no_setting_to_raise() -> None:
    assert advised(in_force=limits(32, "latency", tuned=4), waiting=6) == []


def test_a_full_batch_is_told_without_advising_another_goal() -> None:
    (suggestion,) = advised(in_force=limits(4, "throughput"), waiting=6)
    assert suggestion == "Raise max_batch_size above 4: 100% of 20 batches were full while 6.0 sequences waited."


def test_only_the_goal_of_the_latest_batch_counts() -> None:
    """A goal that was set, or given up, while it ran."""
    for earlier, latest, is_advised in [(None, "throughput", False), ("throughput", None, True)]:
        optimizer = BatchingOptimizer()
        for target in [earlier] * 19 + [latest]:
            optimizer.record_step(record(waiting=6), "continuous", limits(4, target), 0)
        (suggestion,) = optimizer.get_recommendations()["suggestions"]
        assert ("set target='throughput'" in suggestion) is is_advised


def test_batches_that_are_not_padded_waste_nothing() -> None:
    """Of unequal lengths that run together it said that half were padding."""
    batcher, optimizer = DynamicBatcher(BatchingConfig(strategy="continuous")), BatchingOptimizer()
    batcher.add_items([("short", 10), ("long", 1000)])
    for _ in range(10):
        optimizer.record_batch(batcher.get_next_batch()[1], processing_time=0.5)
    recommendations = optimizer.get_recommendations()
    assert recommendations["strategies"]["continuous"]["efficiency"] == 1.0
    assert recommendations["suggestions"] == []


def test_steps_that_take_no_time_have_no_rate() -> None:
    optimizer = BatchingOptimizer()
    optimizer.record_step(record(seconds=0.0), "continuous", limits(), 0)
    figures = optimizer.get_recommendations()["strategies"]["continuous"]
    assert (figures["tokens_per_second"], figures["max_memory"]) == (0.0, 0.0)


def test_empty_places_of_a_static_batch_call_for_a_continuous_one() -> None:
    (suggestion,) = advised(strategy="naive", in_force=limits(8), waiting=5)
    assert "continuous" in suggestion
    assert suggestion.figures == {"share": 1.0, "batches": 20, "places": 4.0}


def test_padding_calls_for_buckets() -> None:
    optimizer = BatchingOptimizer()
    for _ in range(10):
        optimizer.record_batch({"strategy": "naive", "batch_size": 2, "lengths": [10, 90], "max_length": 90}, 0.1)
    (suggestion,) = optimizer.get_recommendations()["suggestions"]
    assert "44% of the computed tokens of 10 batches were padding" in suggestion


def test_memory_that_is_nearly_full_is_told_first() -> None:
    optimizer = BatchingOptimizer()
    for _ in range(10):
        optimizer.record_batch({"strategy": "naive", "batch_size": 2, "lengths": [10, 90], "max_length": 90}, 0.1, 0.95)
    assert optimizer.get_recommendations()["suggestions"][0].figures == {"memory": 0.95}


def test_prompts_that_hold_up_streams_call_for_smaller_chunks() -> None:
    optimizer = BatchingOptimizer()
    for _ in range(10):
        optimizer.record_step(record(), "continuous", limits(), 0)
        optimizer.record_step(record(seconds=0.5, tokens=400, rows=5, prompt_tokens=396), "continuous", limits(), 0)
    (suggestion,) = optimizer.get_recommendations()["suggestions"]
    assert suggestion.figures == {"mixed_ms": pytest.approx(500), "plain_ms": pytest.approx(10)}
    assert "target='latency'" in suggestion

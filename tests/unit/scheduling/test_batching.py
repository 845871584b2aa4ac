"""The stand-alone batcher, by hand. Numbers like 004-71 are rows of the requirements checklist, B4-13 a bug of old."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock import BatchingConfig, BatchingStrategy, ContinuousBatcher, DynamicBatcher, MemoryEstimator
from penstock.errors import ConfigurationError, RequestError, RequestTooLarge

TINY = MemoryEstimator(64, 2, 4, vocab_size=100, dtype="float32", max_step_tokens=16)


def batcher(strategy: str, estimator: MemoryEstimator | None = None, **settings: Any) -> DynamicBatcher:
    """A batcher whose clock stands still."""
    return DynamicBatcher(BatchingConfig(strategy=strategy, **settings), estimator, clock=lambda: 0.0)


def batches(dynamic_batcher: DynamicBatcher) -> list[list[Any]]:
    """Everything that static batches give."""
    batches = []
    while (batch := dynamic_batcher.get_next_batch()[0]) != []:
        batches.append(batch)
    return batches


def test_defaults_are_those_of_the_table() -> None:
    """004-76 to 004-81."""
    config = BatchingConfig()
    assert config.strategy is BatchingStrategy.MEMORY_AWARE
    assert (config.bucket_size, config.memory_limit_mb, config.max_total_tokens) == (128, 4096, 32768)
    assert config.enable_continuous_batching


def test_wrong_settings_say_what_to_change() -> None:
    with pytest.raises(ConfigurationError, match="unknown setting 'bucketsize': did you mean 'bucket_size'"):
        BatchingConfig(bucketsize=3)
    config = BatchingConfig()
    with pytest.raises(ConfigurationError, match=r"max_batch_size.*greater than or equal to 1.*got 0"):
        config.max_batch_size = 0


def test_empty_batcher_gives_nothing() -> None:
    """004-70."""
    assert DynamicBatcher().get_next_batch() == ([], {})


def test_naive_takes_them_as_they_come() -> None:
    """004-72."""
    dynamic_batcher = batcher("naive", max_batch_size=2)
    dynamic_batcher.add_items([("item1", 100), ("item2", 150), ("item3", 200)])
    batch, info = dynamic_batcher.get_next_batch()
    assert batch == ["item1", "item2"]
    assert info == {
        "strategy": "naive",
        "batch_size": 2,
        "max_length": 150,
        "lengths": [100, 150],
        "total_tokens": 250,
        "efficiency": 250 / 300,
    }
    assert batches(dynamic_batcher) == [["item3"]]


def test_bucketed_groups_similar_lengths() -> None:
    """004-73."""
    dynamic_batcher = batcher("bucketed", bucket_size=64)
    dynamic_batcher.add_items([("item1", 100), ("item2", 260), ("item3", 150), ("item4", 120)])
    batch, info = dynamic_batcher.get_next_batch()
    assert batch == ["item1", "item3", "item4"]
    assert (info["strategy"], info["bucket_length"], info["max_length"]) == ("bucketed", 150, 150)
    assert batches(dynamic_batcher) == [["item2"]]


def test_memory_aware_stays_within_the_limit() -> None:
    """004-74."""
    limit_mb = TINY.estimate_batch_memory(3, 200) / 2**20
    dynamic_batcher = batcher("memory_aware", TINY, memory_limit_mb=limit_mb)
    dynamic_batcher.add_items([("long", 200), ("a", 10), ("b", 190), ("c", 20), ("d", 30)])
    batch, info = dynamic_batcher.get_next_batch()
    assert batch == ["long", "a", "c"], "the first in line, then the least memory"
    assert info["estimated_memory_mb"] == pytest.approx(limit_mb)
    assert info["memory_utilization"] == pytest.approx(1.0)
    assert batches(dynamic_batcher) == [["b", "d"]]


def test_what_never_fits_is_an_error_and_no_item_of_the_call_is_added() -> None:
    """B4-13: it was kept, and ([], {}) came back for ever."""
    dynamic_batcher = batcher("memory_aware", TINY, memory_limit_mb=1)
    with pytest.raises(RequestTooLarge, match=r"1500 tokens needs \d MiB alone and memory_limit_mb is 1"):
        dynamic_batcher.add_items([("small", 10), ("huge", 1500)])
    assert (dynamic_batcher.num_waiting, dynamic_batcher.get_next_batch()) == (0, ([], {}))
    dynamic_batcher.add_items([("small", 10)])
    assert batches(dynamic_batcher) == [["small"]]
    for length in (0, 2049):
        with pytest.raises(RequestTooLarge, match="max_sequence_length=2048"):
            dynamic_batcher.add_items([("x", length)])


def test_total_tokens_count_padding() -> None:
    """B4-13: max_total_tokens was never read."""
    dynamic_batcher = batcher("naive", max_total_tokens=100)
    dynamic_batcher.add_items([("a", 10), ("b", 30), ("c", 30), ("d", 40), ("e", 5)])
    assert batches(dynamic_batcher) == [["a", "b", "c"], ["d", "e"]]
    with pytest.raises(RequestTooLarge, match="max_total_tokens=100"):
        dynamic_batcher.add_items([("f", 101)])


def test_memory_aware_needs_no_estimator() -> None:
    dynamic_batcher = DynamicBatcher(BatchingConfig(max_total_tokens=100))
    dynamic_batcher.add_items([("a", 60), ("b", 60), ("c", 40), ("d", 10)])
    assert batches(dynamic_batcher) == [["a"], ["b"], ["c", "d"]]


def test_priority_and_arrival_decide_who_comes_first() -> None:
    """B4-13: shortest came first, whatever its priority and arrival."""
    dynamic_batcher = batcher("memory_aware", max_batch_size=1)
    requests = [SimpleNamespace(name=name, priority=priority) for name, priority in (("a", 2), ("b", 4), ("c", 2))]
    dynamic_batcher.add_items(zip(requests, (50, 90, 10), strict=True))
    assert [batch[0].name for batch in batches(dynamic_batcher)] == ["b", "a", "c"]


def test_waiting_carries_a_low_class_past_newcomers() -> None:
    now = 0.0
    dynamic_batcher = DynamicBatcher(BatchingConfig(strategy="naive", max_batch_size=1), clock=lambda: now)
    dynamic_batcher.add_items([(SimpleNamespace(name="old", priority=1), 5)])
    now = 16.0
    dynamic_batcher.add_items([(SimpleNamespace(name="new", priority=3), 5)])
    assert dynamic_batcher.get_next_batch()[0][0].name == "old"


def test_continuous_batches_go_on_until_requests_are_completed() -> None:
    """004-75, B4-14: nothing without an attribute is_complete ever left."""
    dynamic_batcher = batcher("continuous", max_batch_size=3)
    dynamic_batcher.add_items([("a", 10), ("b", 20)])
    batch, info = dynamic_batcher.get_next_batch()
    assert batch == ["a", "b"]
    assert (info["continuing_requests"], info["new_requests"], info["efficiency"]) == (0, 2, 1.0)
    dynamic_batcher.add_items([("c", 5), ("d", 5)])
    batch, info = dynamic_batcher.get_next_batch()
    assert batch == ["a", "b", "c"]
    assert (info["continuing_requests"], info["new_requests"], info["lengths"]) == (2, 1, [10, 20, 5])
    dynamic_batcher.complete("a")
    assert dynamic_batcher.get_next_batch()[0] == ["b", "c", "d"]
    dynamic_batcher.complete("b", "c", "d")
    assert dynamic_batcher.get_next_batch() == ([], {})
    with pytest.raises(RequestError, match="'a' is not running"):
        dynamic_batcher.complete("a")


def test_continuous_counts_what_runs_without_padding() -> None:
    dynamic_batcher = batcher("continuous", TINY, max_total_tokens=100)
    dynamic_batcher.add_items([("a", 60), ("b", 30), ("c", 20)])
    batch, info = dynamic_batcher.get_next_batch()
    assert batch == ["a", "b"]
    assert info["estimated_memory_mb"] * 2**20 == TINY.estimate_batch_memory(2, 45)


def test_continuous_without_continuing_is_a_static_batch() -> None:
    """004-79."""
    dynamic_batcher = batcher("continuous", max_batch_size=2, enable_continuous_batching=False)
    dynamic_batcher.add_items([("a", 1), ("b", 1), ("c", 1)])
    assert dynamic_batcher.get_next_batch()[0] == ["a", "b"]
    dynamic_batcher.complete("a")
    assert dynamic_batcher.get_next_batch()[0] == ["b"]
    dynamic_batcher.complete("b")
    assert dynamic_batcher.get_next_batch()[0] == ["c"]


def test_limits_may_change_between_batches() -> None:
    dynamic_batcher = batcher("naive", max_batch_size=1)
    dynamic_batcher.add_items([(name, 5) for name in "abcd"])
    assert dynamic_batcher.get_next_batch()[0] == ["a"]
    dynamic_batcher.config.max_batch_size = 3
    assert dynamic_batcher.get_next_batch()[0] == ["b", "c", "d"]


def test_a_limit_lowered_below_an_item_that_waits_does_not_strand_it() -> None:
    dynamic_batcher = batcher("memory_aware", TINY)
    dynamic_batcher.add_items([("a", 1000), ("b", 10)])
    dynamic_batcher.config.memory_limit_mb = 0.01
    assert batches(dynamic_batcher) == [["a"], ["b"]]


def test_the_strategy_is_the_one_of_the_beginning() -> None:
    """It was read anew for what a batch costs and is called, and not for who starts."""
    dynamic_batcher = batcher("bucketed", bucket_size=5)
    dynamic_batcher.add_items([("a", 10), ("b", 12)])
    dynamic_batcher.config.strategy = BatchingStrategy.CONTINUOUS
    batch, info = dynamic_batcher.get_next_batch()
    assert batch == ["a", "b"]
    assert (info["strategy"], info["bucket_length"]) == ("bucketed", 12)


def test_batching_config_takes_every_field_of_the_original() -> None:
    """004-82."""
    config = BatchingConfig(
        strategy=BatchingStrategy.MEMORY_AWARE,
        max_batch_size=32,
        max_sequence_length=2048,
        bucket_size=128,
        memory_limit_mb=4096,
        padding_token_id=0,
        batch_timeout_ms=50.0,
        enable_continuous_batching=True,
        prefill_chunk_size=512,
        max_total_tokens=32768,
    )
    DynamicBatcher(config, TINY).add_items([("a", 2048)])


def test_padding_token_id_pads_the_tensors_of_a_batch() -> None:
    """004-82, 004-87."""
    dynamic_batcher = DynamicBatcher(BatchingConfig(padding_token_id=9, max_sequence_length=3))
    padded = dynamic_batcher.create_padded_batch([torch.tensor([1, 2, 3]), torch.tensor([[4]])])
    assert padded["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(RequestTooLarge, match="4 tokens exceeds max_sequence_length=3"):
        dynamic_batcher.create_padded_batch([torch.tensor([1, 2, 3, 4])])
    assert dynamic_batcher.create_padded_batch([]) == {}


def test_batch_timeout_ms_holds_a_small_batch_back_until_it_is_full_or_old() -> None:
    """004-82, B4-9: it was never read."""
    now = 0.0
    config = BatchingConfig(strategy="naive", max_batch_size=2, batch_timeout_ms=50)
    dynamic_batcher = DynamicBatcher(config, clock=lambda: now)
    dynamic_batcher.add_items([("a", 5)])
    now = 0.049
    assert dynamic_batcher.get_next_batch() == ([], {})
    now = 0.051
    assert dynamic_batcher.get_next_batch()[0] == ["a"]
    dynamic_batcher.add_items([("b", 5), ("c", 5), ("d", 5)])
    assert dynamic_batcher.get_next_batch()[0] == ["b", "c"], "a full batch does not wait"
    assert dynamic_batcher.get_next_batch() == ([], {})
    dynamic_batcher.config.batch_timeout_ms = 0
    assert dynamic_batcher.get_next_batch()[0] == ["d"]


def test_batch_timeout_ms_delays_nothing_that_joins_a_running_batch() -> None:
    """004-82."""
    dynamic_batcher = batcher("continuous", max_batch_size=2, batch_timeout_ms=50)
    dynamic_batcher.add_items([("a", 5), ("b", 5)])
    assert dynamic_batcher.get_next_batch()[0] == ["a", "b"]
    dynamic_batcher.complete("a")
    dynamic_batcher.add_items([("c", 5)])
    assert dynamic_batcher.get_next_batch()[0] == ["b", "c"]


def test_prefill_chunk_size_limits_the_tokens_that_join_at_once() -> None:
    """004-82: it was never read."""
    dynamic_batcher = batcher("continuous", prefill_chunk_size=10)
    dynamic_batcher.add_items([("a", 6), ("b", 4), ("long", 30), ("c", 1)])
    assert dynamic_batcher.get_next_batch()[0] == ["a", "b"]
    assert dynamic_batcher.get_next_batch()[0] == ["a", "b", "long"], "one always joins"
    assert dynamic_batcher.get_next_batch()[0] == ["a", "b", "long", "c"]


def test_continuous_batcher_gives_the_requests_that_go_on_and_the_new_ones() -> None:
    """004-87: the strategy of the configuration does not matter, its limits do."""
    continuous_batcher = ContinuousBatcher(BatchingConfig(max_batch_size=2), TINY)
    one, two, three = (SimpleNamespace(is_complete=False) for _ in range(3))
    continuous_batcher.add_request(one, 10)
    assert continuous_batcher.update_batch() == ([], [(one, 10)])
    continuous_batcher.add_request(two, 20)
    continuous_batcher.add_request(three, 30)
    assert continuous_batcher.update_batch() == ([(one, 10)], [(two, 20)])
    one.is_complete = True
    assert continuous_batcher.update_batch() == ([(two, 20)], [(three, 30)])
    continuous_batcher.complete(three)
    two.is_complete = lambda: True
    assert continuous_batcher.update_batch() == ([], [])


def test_continuous_batcher_needs_no_attribute_and_keeps_to_its_memory() -> None:
    """004-87, B4-14: a request without `is_complete` never left."""
    limit_mb = TINY.estimate_batch_memory(1, 200) / 2**20
    continuous_batcher = ContinuousBatcher(BatchingConfig(memory_limit_mb=limit_mb), TINY)
    continuous_batcher.add_request("a", 200)
    continuous_batcher.add_request("b", 200)
    assert continuous_batcher.update_batch() == ([], [("a", 200)])
    assert continuous_batcher.update_batch() == ([("a", 200)], [])
    continuous_batcher.complete("a")
    assert continuous_batcher.update_batch() == ([], [("b", 200)])


def test_a_config_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="config must be a BatchingConfig, got"):
        DynamicBatcher({"max_batch_size": 2})  # type: ignore[arg-type]

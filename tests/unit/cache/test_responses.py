"""`ResponseCache`: order of eviction, copies, threads; `frozen`: keys that cannot collide."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from penstock import OutputKind, RequestPriority, SamplingParams, StructuredOutputs
from penstock.cache.responses import ResponseCache, Unfreezable, frozen


def test_least_recently_used_value_is_dropped_first() -> None:
    """B0-16: an earlier cache dropped the oldest value, used or not."""
    cache: ResponseCache[list[int]] = ResponseCache(2, list)
    cache.put("1", [1])
    cache.put("2", [2])
    assert cache.get("1") == [1]
    cache.put("3", [3])
    assert [key in cache for key in "123"] == [True, False, True]
    cache.put("1", [4])
    cache.put("5", [5])
    assert (cache.get("1"), cache.get("3"), len(cache)) == ([4], None, 2)
    assert (cache.num_hits, cache.num_misses) == (2, 1)


def test_values_are_copied_in_and_out() -> None:
    """B0-17: an earlier cache returned the stored object itself, which callers then changed."""
    cache: ResponseCache[list[int]] = ResponseCache(2, list)
    value = [1]
    cache.put("a", value)
    value.append(2)
    first = cache.get("a")
    assert first == [1]
    first.append(3)
    assert cache.get("a") == [1]


def test_cache_of_size_zero_keeps_nothing() -> None:
    cache: ResponseCache[list[int]] = ResponseCache(0, list)
    cache.put("a", [1])
    assert len(cache) == 0


def test_clear_drops_all_values() -> None:
    cache: ResponseCache[list[int]] = ResponseCache(4, list)
    cache.put("a", [1])
    cache.clear()
    assert (len(cache), cache.get("a")) == (0, None)
    assert repr(cache) == "<ResponseCache of 0 results, at most 4>"


def test_threads_share_one_cache() -> None:
    cache: ResponseCache[list[int]] = ResponseCache(8, list)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(500):
                key = (number * i) % 13
                value = cache.get(key)
                assert value is None or value == [key]
                cache.put(key, [key])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(cache) == 8
    assert cache.num_hits + cache.num_misses == 16 * 500


DISTINCT: list[Any] = [
    "a|||b", ["a", "b"], ("a", "b"), [["a", "b"]], ["a", ["b"]], ["ab"],
    1, 1.0, True, "1", [1], [1.0], [True], None, "None", [], (), {},
    {"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": {"b": 1}}, {"a": ["b", 1]}, [["a", 1], ["b", 2]],
    RequestPriority.LOW, OutputKind.DELTA, "delta",
    SamplingParams(), SamplingParams(seed=1), SamplingParams(logit_bias={1: 2.0}), SamplingParams(logit_bias={1: 3.0}),
    SamplingParams(stop="a"), SamplingParams(stop=["a", "b"]), SamplingParams(stop_token_ids=[1]),
    SamplingParams(structured_outputs=StructuredOutputs(regex="a")),
    SamplingParams(structured_outputs=StructuredOutputs(grammar="a")),
]  # fmt: skip


def test_different_data_has_different_keys() -> None:
    """B0-14: an earlier key joined prompts with "|||"."""
    keys = [frozen(value) for value in DISTINCT]
    assert len(set(keys)) == len(keys)


def test_equal_data_has_equal_keys() -> None:
    assert frozen(["a", {"b": (1, 2.0)}]) == frozen(["a", {"b": (1, 2.0)}])
    assert frozen(SamplingParams(seed=1, stop="a")) == frozen(SamplingParams(seed=1, stop=["a"]))


@pytest.mark.parametrize("value", [print, object(), SamplingParams(logits_processors=[lambda ids, row: row]), {1}])
def test_what_may_answer_differently_later_has_no_key(value: Any) -> None:
    """B0-14: an earlier key raised `TypeError` for what is not JSON."""
    with pytest.raises(Unfreezable):
        frozen(value)

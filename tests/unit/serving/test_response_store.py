"""`ResponseStore`: bounds, eviction, conversations."""

from __future__ import annotations

import pytest

from penstock.serving.responses.store import ResponseStore, StoredResponse


def stored(text: str, previous_id: str | None = None) -> StoredResponse:
    return StoredResponse.of({"output": [{"answer": text}]}, [{"question": text}], previous_id)


def test_a_conversation_is_the_items_of_all_its_responses() -> None:
    store = ResponseStore(10, 1 << 20)
    store.put("", "a", stored("1"))
    store.put("", "b", stored("2", "a"))
    assert store.conversation("", "b", 1 << 20) == [
        {"question": "1"},
        {"answer": "1"},
        {"question": "2"},
        {"answer": "2"},
    ]


def test_using_a_response_uses_those_that_it_continues() -> None:
    store = ResponseStore(3, 1 << 20)
    for name, previous_id in (("a", None), ("b", "a"), ("c", None)):
        store.put("", name, stored(name, previous_id))
    store.conversation("", "b", 1 << 20)
    store.put("", "d", stored("d"))
    assert [name for name in "abcd" if store.get("", name)] == ["a", "b", "d"]


def test_the_bytes_are_bounded_and_a_new_state_takes_the_place_of_the_old() -> None:
    size = stored("x" * 100).num_bytes
    store = ResponseStore(100, 3 * size)
    for name in "aabbccdd":
        store.put("", name, stored("x" * 100))
    assert [name for name in "abcd" if store.get("", name)] == ["b", "c", "d"]
    store.put("", "e", stored("x" * 1000))  # larger than everything together
    assert [name for name in "abcde" if store.get("", name)] == []
    store.put("", "f", stored("x" * 100))
    assert store.get("", "f") is not None


def test_namespaces_have_bounds_of_their_own() -> None:
    store = ResponseStore(1, 1 << 20)
    store.put("x", "a", stored("1"))
    store.put("y", "b", stored("2"))
    assert store.get("x", "a") is not None
    assert store.get("y", "a") is None
    assert not store.delete("y", "a")
    assert store.delete("x", "a")


def test_a_missing_link_and_a_conversation_that_is_too_long_are_told_apart() -> None:
    store = ResponseStore(10, 1 << 20)
    store.put("", "a", stored("1"))
    store.put("", "b", stored("2", "a"))
    with pytest.raises(OverflowError):
        store.conversation("", "b", store.get("", "b").num_bytes)  # type: ignore[union-attr]
    store.delete("", "a")
    with pytest.raises(KeyError, match="a"):
        store.conversation("", "b", 1 << 20)


def test_a_store_of_nothing_keeps_nothing() -> None:
    store = ResponseStore(0, 1 << 20)
    store.put("", "a", stored("1"))
    assert store.get("", "a") is None

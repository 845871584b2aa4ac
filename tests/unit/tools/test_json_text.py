"""The scanner of JSON text accepts what json.loads accepts, and finds the end wherever the text is cut."""

from __future__ import annotations

import json
from collections.abc import Generator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.tools.cursor import Cursor, EndOfText, Malformed
from penstock.tools.json_text import MAX_DEPTH, is_json_object, json_string, json_value

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)
PIECES = st.lists(
    st.sampled_from(
        ["{", "}", "[", "]", ",", ":", '"', "a", "\\", "\\u12", "1", "-", ".", "e", " ", "\n", "true", '"a":', "[1],"]
    ),
    max_size=14,
)


def read(parts: list[str]) -> tuple[str, str, bool]:
    """(text of the value, text behind it, whether the value is complete)."""
    cursor = Cursor()
    delivered: list[str] = []
    reader = json_value(cursor, delivered.append)
    ends: list[bool] = []  # whether the value is complete, once reading stops
    for part in [*parts, None]:
        cursor.feed(part or "")
        cursor.closed = part is None
        if not ends:
            ends += step(reader)
    return "".join(delivered), cursor.rest(), ends[0]


def step(reader: Generator[None, None, None]) -> list[bool]:
    try:
        next(reader)
    except StopIteration:
        return [True]
    except (Malformed, EndOfText):
        return [False]
    return []


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=int)
    except ValueError:
        return False
    return True


def parts_of(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(bounds)]


@given(VALUES, st.lists(st.integers(0, 500), max_size=6), st.sampled_from([None, 1]), st.booleans())
def test_a_value_is_read_to_its_end_however_it_is_cut(
    value: object, places: list[int], indent: int | None, is_ascii: bool
) -> None:
    text = json.dumps([value], indent=indent, ensure_ascii=is_ascii)
    assert read(parts_of(text + " rest", places)) == (text, " rest", True)


@given(PIECES, st.lists(st.integers(0, 50), max_size=6))
def test_any_text_is_read_alike_however_it_is_cut(pieces: list[str], places: list[int]) -> None:
    text = "".join(pieces)
    delivered, rest, complete = read([text])
    assert read(parts_of(text, places)) == (delivered, rest, complete)
    assert read(list(text)) == (delivered, rest, complete)
    assert delivered + rest == text
    if complete:
        assert is_json(delivered)
    elif is_json(text):
        raise AssertionError(f"{text!r} is JSON")


@given(PIECES)
def test_only_json_objects_are_objects(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert is_json_object(text) == (is_json(text) and isinstance(json.loads(text), dict))


def test_nesting_is_bounded_and_nothing_recurses() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert read([deep]) == (deep, "", True)
    text = "[" * 100_000
    assert read([text]) == ("[" * MAX_DEPTH, text[MAX_DEPTH:], False)
    assert read(list(text[:1000])) == ("[" * MAX_DEPTH, text[MAX_DEPTH:1000], False)
    mixed = '{"a": [' * 100
    assert read([mixed])[0] == mixed[: 7 * MAX_DEPTH // 2]


@pytest.mark.parametrize(
    "text", ["01", "1.", "tru", "nul", "[1,]", '{"a":1,}', "{a:1}", "'a'", '"a\nb"', '"\\x"', "1" * 500]
)
def test_what_is_no_json_is_not_complete(text: str) -> None:
    assert not read([text])[2]


def test_a_string_is_returned_decoded() -> None:
    cursor = Cursor()
    cursor.feed('"\\u00e9\\n" rest')
    with pytest.raises(StopIteration) as end:
        next(json_string(cursor))
    assert end.value.value == "é\n"
    assert cursor.rest() == " rest"

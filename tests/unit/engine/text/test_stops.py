"""Stop strings end a text with the character that completes them, however the text is split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.text.stops import StopStrings


def find(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """(start, stop) of the stop that is completed first; of several, the one that starts earliest."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return end - len(longest), longest
    return None


def visible(text: str, stops: tuple[str, ...], include: bool) -> str:
    """The text that may be shown, by definition."""
    if found := find(text, stops):
        return text[: found[0] + (len(found[1]) if include else 0)]
    could_grow = [n for n in range(len(text) + 1) for s in stops if n < len(s) and text.endswith(s[:n])]
    return text[: len(text) - max(could_grow, default=0)]


@pytest.mark.parametrize(
    ("stops", "pushes", "shown", "stop"),
    [
        (("STOP",), ["aSTOPb"], ["a"], "STOP"),
        (("STOP",), ["aST", "OPb"], ["a", ""], "STOP"),
        (("STOP",), ["aST", "AY"], ["a", "STAY"], None),
        (("aab",), ["aa", "a", "b"], ["", "a", ""], "aab"),
        (("\n\n",), ["x\n", "y\n", "\n"], ["x", "\ny", ""], "\n\n"),
        (("abcd", "c"), ["abc"], ["ab"], "c"),
        (("c", "abc"), ["ab", "c"], ["", ""], "abc"),
        (("ab", "abc"), ["abc"], [""], "ab"),
        ((), ["anything"], ["anything"], None),
    ],
)
def test_examples_by_hand(stops: tuple[str, ...], pushes: list[str], shown: list[str], stop: str | None) -> None:
    found = StopStrings(stops, include=False)
    results = [found.push(text) for text in pushes]
    assert [text for text, _ in results] == shown
    assert results[-1][1] == stop


def test_include_shows_the_stop_and_nothing_behind_it() -> None:
    stops = StopStrings(("STOP",), include=True)
    assert [stops.push("aST"), stops.push("OPb"), stops.push("c")] == [("a", None), ("STOP", "STOP"), ("", "STOP")]
    assert stops.flush() == ""


def test_flush_gives_what_was_held_back_and_begins_anew() -> None:
    stops = StopStrings(("STOP",), include=False)
    assert (stops.push("xSTO"), stops.flush(), stops.flush()) == (("x", None), "STO", "")
    assert stops.push("P") == ("P", None)


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    include=st.booleans(),
)
def test_every_split_shows_the_maximal_safe_prefix_at_every_step(
    text: str, stops: tuple[str, ...], include: bool
) -> None:
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            check_split(text, stops, include, (0, first, second, len(text)))


@given(
    parts=st.lists(st.text("ab\n", max_size=3), max_size=20),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=9), min_size=1, max_size=4).map(tuple),
)
def test_many_small_pushes_show_the_maximal_safe_prefix_at_every_step(parts: list[str], stops: tuple[str, ...]) -> None:
    cuts = [sum(map(len, parts[:n])) for n in range(len(parts) + 1)]
    check_split("".join(parts), stops, False, tuple(cuts))


def check_split(text: str, stops: tuple[str, ...], include: bool, cuts: tuple[int, ...]) -> None:
    """Push a text cut at the given places and compare with the definition after each push."""
    finder, shown = StopStrings(stops, include), ""
    for start, end in pairwise(cuts):
        safe, stop = finder.push(text[start:end])
        shown += safe
        expected = find(text[:end], stops)
        assert (shown, stop) == (visible(text[:end], stops, include), expected and expected[1])
    complete = visible(text, stops, include) if find(text, stops) else text
    assert shown + finder.flush() == complete


class CountingText(str):
    """A text that counts how often its characters are read one by one."""

    num_read = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        """Characters, counted."""
        for character in str.__iter__(self):
            CountingText.num_read += 1
            yield character


def test_every_character_is_read_once_however_long_the_held_back_part_is() -> None:
    stops = StopStrings(("a" * 5_000 + "b", "a" * 3_000 + "c"))
    CountingText.num_read = 0
    shown = [stops.push(CountingText("a"))[0] for _ in range(20_000)]
    assert CountingText.num_read == 20_000
    assert sum(map(len, shown)) == 15_000

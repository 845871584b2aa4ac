"""Tokens become text and end at stop strings; the count tells which token completed one."""

from __future__ import annotations

from typing import Any

from penstock.engine.text.detokenizer import Detokenizer
from penstock.engine.text.stops import StopStrings
from penstock.engine.text.stream import NoText, TextDelta, TextStream
from tests.tokenizers_for_tests import byte_fallback, byte_level

TOKENIZER = byte_level()


def letters(text: str) -> list[int]:
    """One token per byte of an ASCII text."""
    return [TOKENIZER.get_vocab()[letter] for letter in text]


def open_stream(*stops: str, include: bool = False, min_tokens: int = 0, tokenizer: Any = TOKENIZER) -> TextStream:
    return TextStream(Detokenizer(tokenizer), StopStrings(stops, include), min_tokens)


def test_text_without_stops_goes_straight_through() -> None:
    stream = open_stream()
    assert stream.push(letters("abc")) == TextDelta("abc", None, 3)
    assert stream.push([]) == TextDelta("", None, 0)
    assert stream.finish() == TextDelta("", None, 0)


def test_a_stop_counts_the_tokens_up_to_the_one_that_completes_it() -> None:
    stream = open_stream("cd")
    assert stream.push(letters("abc")) == TextDelta("ab", None, 3)
    assert stream.push(letters("def")) == TextDelta("", "cd", 1)


def test_nothing_comes_after_a_stop() -> None:
    stream = open_stream("b", include=True)
    assert stream.push(letters("abc")) == TextDelta("ab", "b", 2)
    assert stream.push(letters("abc")) == TextDelta("", "b", 0)
    assert stream.finish() == TextDelta("", "b", 0)


def test_a_stop_inside_a_token_cuts_the_token() -> None:
    [turbine] = [id for token, id in TOKENIZER.get_vocab().items() if token == "Ġturbine"]
    assert open_stream("rb").push([turbine, *letters("x")]) == TextDelta(" tu", "rb", 1)


def test_finish_gives_what_could_have_become_a_stop() -> None:
    stream = open_stream("abc")
    assert stream.push(letters("xab")) == TextDelta("x", None, 3)
    assert stream.finish() == TextDelta("ab", None, 0)


def test_stops_are_not_seen_in_the_first_min_tokens() -> None:
    stream = open_stream("b", min_tokens=3)
    assert stream.push(letters("abba")) == TextDelta("abba", None, 4)
    assert stream.push(letters("ab")) == TextDelta("a", "b", 2)


def test_no_part_of_a_stop_lies_in_the_first_min_tokens() -> None:
    stream = open_stream("ab", min_tokens=1)
    assert stream.push(letters("ab")) == TextDelta("ab", None, 2)
    assert stream.push(letters("ab")) == TextDelta("", "ab", 2)


def test_a_character_completed_after_min_tokens_counts_as_later() -> None:
    stream = open_stream("你", min_tokens=2)
    ids = TOKENIZER("你", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert stream.push(ids) == TextDelta("", "你", 3)


def test_a_stop_in_the_flushed_text_cuts_it_and_is_reported() -> None:
    """It cut the text but was forgotten: the request ended with "length" and no stop reason."""
    stream = open_stream("\ufffd")
    lead = TOKENIZER.get_vocab()["ä"]  # the byte E4
    assert stream.push([*letters("a"), lead]) == TextDelta("a", None, 2)
    assert stream.finish() == TextDelta("", "\ufffd", 0)


def test_a_stop_within_a_byte_run_ends_the_text_where_it_is_complete() -> None:
    """The run was held back to its end, and the stop string with it."""
    tokenizer = byte_fallback()
    stream = open_stream("水", include=True, tokenizer=tokenizer)
    ids = [tokenizer.get_vocab()[token] for token in ("▁the", "<0x41>", "<0xE6>", "<0xB0>", "<0xB4>", "<0x43>")]
    assert stream.push(ids) == TextDelta("theA水", "水", 5)


def test_finish_within_min_tokens_gives_all_text() -> None:
    stream = open_stream("\ufffd", min_tokens=5)
    assert stream.push([TOKENIZER.get_vocab()["ä"]]) == TextDelta("", None, 1)
    assert stream.finish() == TextDelta("\ufffd", None, 0)


def test_tokens_without_text_are_counted() -> None:
    text = NoText()
    assert text.push([1, 2, 3]) == TextDelta("", None, 3)
    assert text.finish() == TextDelta("", None, 0)

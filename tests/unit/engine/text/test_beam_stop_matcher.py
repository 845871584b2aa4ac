"""Stop strings in the texts of beams, which share prefixes."""

from __future__ import annotations

import pytest

from penstock.engine.text.detokenizer import Detokenizer
from penstock.engine.text.stops import StopStrings
from penstock.engine.text.stream import BeamStopMatcher, TextStream
from penstock.errors import RequestError
from tests.letters import LetterTokenizer


def watch(*stops: str, min_tokens: int = 0) -> BeamStopMatcher:
    return BeamStopMatcher(TextStream(Detokenizer(LetterTokenizer()), StopStrings(stops), min_tokens))


def after(watching: BeamStopMatcher | None, text: str) -> BeamStopMatcher | None:
    for letter in text:
        assert watching is not None
        watching = watching.after(ord(letter) - 97)
    return watching


def test_a_stop_string_over_several_tokens_is_found() -> None:
    assert after(watch("bcd"), "abc") is not None
    assert after(watch("bcd"), "abcd") is None


def test_beams_that_go_different_ways_do_not_see_each_others_text() -> None:
    common = after(watch("bcd"), "ab")
    assert after(common, "c") is not None
    assert after(common, "d") is not None
    assert after(common, "cd") is None


def test_the_first_tokens_are_not_looked_at() -> None:
    assert after(watch("b", min_tokens=2), "ab") is not None
    assert after(watch("b", min_tokens=2), "abb") is None


def test_a_text_that_cannot_be_decoded_is_the_requests_error() -> None:
    with pytest.raises(RequestError, match="no text for z"):
        after(watch("b"), "z")

"""Attempts at calls: none is lost, none raises, and the text decides alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.tools import FORMATS, OutputParser, read_attempts
from tests.malformed_tool_calls import FAILURES, Failure
from tests.unit.tools.test_output_parser import OUTPUTS
from tests.unit.tools.texts import TEXTS, TOOLS, fed, plain


@pytest.mark.parametrize("failure", FAILURES, ids=range(len(FAILURES)))
def test_every_attempt_is_reported_and_none_raises(failure: Failure) -> None:
    attempts = read_attempts(failure.text, failure.format, TOOLS)
    assert tuple((attempt.status, attempt.name) for attempt in attempts) == failure.attempts
    for attempt in attempts:
        assert failure.text[attempt.start_pos : attempt.end_pos] == attempt.raw_text
        assert attempt.raw_text
        assert (attempt.arguments == {}) or attempt.status == "complete"


@pytest.mark.parametrize("failure", FAILURES, ids=range(len(FAILURES)))
def test_a_stream_in_any_parts_delivers_the_same_calls(failure: Failure) -> None:
    whole = plain(fed(OutputParser(failure.format, TOOLS), [failure.text]))
    splits = [
        [failure.text[start : start + size] for start in range(0, len(failure.text), size)] for size in (1, 2, 3, 7)
    ]
    splits += [[failure.text[:place], failure.text[place:]] for place in range(1, len(failure.text))]
    for parts in splits:
        assert plain(fed(OutputParser(failure.format, TOOLS), parts)) == whole


@pytest.mark.parametrize("name", list(TEXTS))
def test_an_attempt_that_reaches_the_end_was_cut_off_if_the_model_was_stopped(name: str) -> None:
    text = TEXTS[name][: TEXTS[name].index("tea") + 2]
    assert [(a.status, a.name) for a in read_attempts(text, name, TOOLS, is_cut=True)] == [("cut", "search")]
    assert [(a.status, a.name) for a in read_attempts(text, name, TOOLS)] == [("malformed", "search")]
    whole = read_attempts(TEXTS[name], name, TOOLS, is_cut=True)
    assert [(a.status, a.name) for a in whole] == [("complete", "search"), ("complete", "stop")]
    assert whole[0].arguments == {"query": "tea, (green)", "n": 5, "tags": ["a", "b"]}


@given(OUTPUTS, st.sampled_from(sorted(FORMATS)), st.booleans())
@settings(max_examples=300, deadline=None)
def test_attempts_of_any_text_lie_in_order_and_do_not_overlap(text: str, name: str, is_cut: bool) -> None:
    position = 0
    for attempt in read_attempts(text, name, TOOLS, is_cut=is_cut):
        assert position <= attempt.start_pos < attempt.end_pos <= len(text)
        assert text[attempt.start_pos : attempt.end_pos] == attempt.raw_text
        position = attempt.end_pos

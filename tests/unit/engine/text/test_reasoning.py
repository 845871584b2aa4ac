from __future__ import annotations

import pytest

from penstock.engine.text.detokenizer import Detokenizer
from penstock.engine.text.reasoning import ReasoningEnd
from penstock.engine.text.stops import StopStrings
from penstock.engine.text.stream import TextStream
from tests.tokenizers_for_tests import byte_level

TEXT = "I stop to think.</think>So: yes. stop here"


def shown(text: str, size: int, *, include: bool = False) -> tuple[str, str | None]:
    tokenizer = byte_level()
    stops = StopStrings(("stop", "think"), include)
    stream = TextStream(Detokenizer(tokenizer), stops, 0, ReasoningEnd("</think>"))
    ids, output = tokenizer.encode(text, add_special_tokens=False), ""
    for begin in range(0, len(ids), size):
        delta = stream.push(ids[begin : begin + size])
        output += delta.text
        if delta.stop is not None:
            return output, delta.stop
    last = stream.finish()
    return output + last.text, last.stop


@pytest.mark.parametrize("size", range(1, 12))
def test_stop_strings_sleep_until_the_reasoning_ends(size: int) -> None:
    assert shown(TEXT, size) == ("I stop to think.</think>So: yes. ", "stop")
    assert shown(TEXT, size, include=True) == ("I stop to think.</think>So: yes. stop", "stop")


def test_without_the_marker_no_stop_string_matches() -> None:
    assert shown("stop </thin think", 1) == ("stop </thin think", None)


@pytest.mark.parametrize("cut", range(1, 9))
def test_the_marker_is_found_across_texts(cut: int) -> None:
    reasoning = ReasoningEnd("</think>")
    assert reasoning.push(1, "a" + "</think>"[:cut]) == (1 + cut if cut == 8 else None)
    if cut < 8:
        assert reasoning.push(2, "</think>"[cut:] + "xyz") == 8 - cut


def test_a_special_token_that_the_text_leaves_out_is_the_marker_too() -> None:
    reasoning = ReasoningEnd("</think>", token_id=7)
    assert reasoning.push(6, "</th") is None
    assert reasoning.push(7, "") == 0

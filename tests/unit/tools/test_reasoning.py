"""Reasoning is split from the answer, whether the prompt or the model began it, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import RequestError
from penstock.tools import REASONING_FORMATS, ReasoningSplitter, joined, reasoning_format_named
from tests.unit.tools.texts import plain, split

QWEN3 = REASONING_FORMATS["qwen3"]
TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "</thi", "<th", "ink>", "a", " ", "\n", "Hello"]), max_size=12
).map("".join)


def parted(parts: list[str], is_open: bool = False, name: str = "qwen3") -> list[tuple[object, ...]]:
    splitter = ReasoningSplitter(REASONING_FORMATS[name], is_open=is_open)
    pieces = [piece for part in parts for piece in splitter.feed(part)]
    return plain(joined([*pieces, *splitter.finish()]))


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_reasoning_and_answer_are_parted_at_every_cut(name: str) -> None:
    format = REASONING_FORMATS[name]
    text = f"\n{format.start}\nSo, a < b.\n\nYes.\n{format.end}\n\nThe answer: 5."
    expected = [("reasoning", "So, a < b.\n\nYes."), ("content", "The answer: 5.")]
    for place in range(len(text)):
        assert parted(split(text, [place]), name=name) == expected
    assert parted(list(text), name=name) == expected


def test_the_prompt_may_have_begun_the_reasoning() -> None:
    expected = [("reasoning", "So."), ("content", "5")]
    assert parted(["So.</think>5"], is_open=True) == expected
    assert parted(["<think>So.</think>5"], is_open=True) == expected
    assert parted(["So."], is_open=True) == [("reasoning", "So.")]


def test_an_output_without_reasoning_is_content() -> None:
    assert parted(["\n 5 <think> is a tag"]) == [("content", "\n 5 <think> is a tag")]
    assert parted([" \n"]) == [("content", " \n")]
    assert parted(["<thi"]) == [("content", "<thi")]


def test_only_the_first_end_counts() -> None:
    assert parted(["<think>a</think>b</think>c"]) == [("reasoning", "a"), ("content", "b</think>c")]


def test_reasoning_that_is_cut_off_stays_reasoning() -> None:
    assert parted(["<think>a \n</thi"]) == [("reasoning", "a \n</thi")]


@given(TEXTS, st.lists(st.integers(0, 60), max_size=8), st.booleans())
def test_any_text_is_parted_alike_however_it_is_cut(text: str, places: list[int], is_open: bool) -> None:
    whole = parted([text], is_open)
    assert parted(split(text, places), is_open) == whole
    assert parted(list(text), is_open) == whole
    kinds = [piece[0] for piece in whole]
    assert kinds in ([], ["reasoning"], ["content"], ["reasoning", "content"])
    if kinds == ["content"]:
        assert whole == [("content", text)] or "</think>" in text


@pytest.mark.parametrize(
    ("prompt", "continued", "is_open"),
    [
        ("<|im_start|>assistant\n<think>\n", "", True),
        ("<|im_start|>assistant\n<think>", "", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", False),
        ("<|im_start|>user\nWrite <think>\n<|im_start|>assistant\n", "", False),
        ("...assistant\n<think>\nI should", "<think>\nI should", True),
        ("...assistant\n<think>a</think>b", "<think>a</think>b", False),
    ],
)
def test_the_end_of_the_prompt_says_whether_reasoning_is_open(prompt: str, continued: str, is_open: bool) -> None:
    assert QWEN3.is_open_after(prompt, continued) is is_open


def test_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="unknown reasoning format 'deep': choose one of deepseek_r1, granite"):
        reasoning_format_named("deep")
    assert reasoning_format_named("mistral").end == "[/THINK]"

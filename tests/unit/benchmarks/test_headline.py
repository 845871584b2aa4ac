"""Rows of the table of promises, levels, and the sections of a report that several benchmarks write."""

from __future__ import annotations

from typing import Any

import pytest

import headline
import levels
from harness.sections import replaced, sections_of

FIGURES = {"one_tok_s": 1.0, "many_tok_s": 2.0, "first_token_ms": 3.0}


def test_less_or_more_is_better_by_row() -> None:
    title, promised, unit, *figures = headline.row("first", (0.3, 0.1))
    assert (title, promised, unit) == ("First token, 512 prompt tokens", "under 50 ms, 2.7x", "ms")
    assert figures == pytest.approx([300.0, 100.0, 3.0])
    assert headline.row("padded", (100.0, 400.0))[-1] == 4.0


def test_padding_is_what_nobody_asked_for() -> None:
    work = [([1] * 6, 2), ([1] * 2, 6)]
    assert headline.padded_tokens(work) == 22
    assert headline.useful(work) == 14 / 22


def test_passes_through_the_model_are_timed_and_the_module_is_left_as_it_was() -> None:
    class Module:
        device, dtype = "cpu", "float32"

        class config:
            @staticmethod
            def get_text_config() -> Any:
                return type("Text", (), {"vocab_size": 9})

        def forward(self, value: int) -> int:
            return value + 1

    module = Module()
    watched = headline.Watched(module)
    assert module.forward(1) == 2
    ((begin, end),) = watched.spans
    assert watched.busy() == end - begin >= 0
    watched.close()
    assert "forward" not in vars(module)


def test_level_figures_are_medians_by_token() -> None:
    found = levels.figures([(1.0, 0.1), (4.0, 0.3), (2.0, 0.2)], [2.0, 1.0, 4.0])
    assert found == pytest.approx({"one_tok_s": 32.0, "many_tok_s": 256.0, "first_token_ms": 200.0})
    assert levels.rows({"basic": FIGURES}) == [["basic", 1.0, 2.0, 3.0, None, None]]
    assert "| basic | 1.00 | 2.00 | 3.00 |  |  |" in levels.document("m", {"basic": FIGURES}, "do it")


def test_sections_are_replaced_and_kept() -> None:
    text = replaced(replaced("# Report\n", "a", "one\n"), "b", "two")
    assert text == "# Report\n\n<!-- section: a -->\none\n\n<!-- section: b -->\ntwo\n"
    assert replaced(text, "a", "ten") == text.replace("one", "ten")
    assert replaced(text, "b", "ten") == text.replace("two", "ten")
    assert "# New\n\n" + sections_of(text) == text.replace("Report", "New")
    assert sections_of("# Report\n") == ""
    assert replaced("", "a", "one") == "<!-- section: a -->\none\n"

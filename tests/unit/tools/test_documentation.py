"""The code in docs/tools.md runs, and its table of formats is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.tools import FORMATS, REASONING_FORMATS

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "tools.md").read_text(encoding="utf-8")


def test_code_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "One moment."
    assert printed[-1] == "Tea is a plant. Tea."


def test_every_format_is_in_the_documentation() -> None:
    assert [name for name in (*FORMATS, *REASONING_FORMATS) if f"`{name}`" not in TEXT] == []

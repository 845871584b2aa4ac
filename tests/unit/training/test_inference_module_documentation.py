"""The code in docs/inference_module.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "inference_module.md").read_text(encoding="utf-8")


def test_code_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """000-64."""
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        exec(code, names)
    printed = capsys.readouterr().out
    assert "torch.Size([2, " in printed

"""The code of docs/training.md runs and prints what the text around it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.M | re.S)
SCORING = next(block for block in BLOCKS if "engine.score(" in block)


def test_the_guide_scores_a_rollout_under_the_model_and_as_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    exec(SCORING, {})
    printed = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert [*printed] == ["model", "sampled", "entropy"]
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d*(?:e-?\d+)?", printed["sampled"])]
    assert len(numbers) == 8
    assert all(abs(a - b) < 1e-4 for a, b in zip(numbers[:4], numbers[4:], strict=True))

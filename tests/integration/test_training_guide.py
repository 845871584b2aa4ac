"""The code of docs/training.md runs and prints what the text around it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.kernels import native

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S)
SCORING = next(block for block in BLOCKS if "engine.score(" in block)


def test_the_guide_scores_a_rollout_under_the_model_and_as_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    exec(SCORING, {})
    printed = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert [*printed] == ["model", "sampled", "entropy"]
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d*(?:e-?\d+)?", printed["sampled"])]
    assert len(numbers) == 8
    assert all(abs(a - b) < 1e-4 for a, b in zip(numbers[:4], numbers[4:], strict=True))


def test_the_guide_checks_an_engine_and_finds_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    exec(next(block for block in BLOCKS if "check_logprobs" in block), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "as it should be: True"
    if found := re.fullmatch(r"after a mistake: (\d+\.\d) nats at token \d+", second):
        assert float(found[1]) > 0 or not native.available()
    assert found


def test_every_report_of_the_guide_has_its_test() -> None:
    rows = re.findall(r"^\| (T\d+) \|.*\| (.*) \|$", GUIDE, re.MULTILINE)
    assert [number for number, _ in rows] == [f"T{i}" for i in range(1, 21)]
    names = {name for _, cell in rows for name in re.findall(r"`(test_\w+)`", cell)}
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in names if f"def {name}(" not in sources} == set()
    assert len(names) == 19

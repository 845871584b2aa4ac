"""The code of docs/training.md runs and prints what the text around it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.M | re.S)


def test_the_guide_scores_a_rollout_under_the_model_and_as_sampled() -> None:
    (script,) = BLOCKS
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert [*printed] == ["model", "sampled", "entropy"]
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d*(?:e-?\d+)?", printed["sampled"])]
    assert len(numbers) == 8
    assert all(abs(a - b) < 1e-4 for a, b in zip(numbers[:4], numbers[4:], strict=True))

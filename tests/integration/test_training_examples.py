"""The training runs of the examples: rewards rise, and the engine's log probabilities are the trainer's."""

from __future__ import annotations

import asyncio
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.timeout(900)
def test_mean_reward_of_grpo_rises(capsys: pytest.CaptureFixture[str]) -> None:
    train = runpy.run_path(str(EXAMPLES / "grpo.py"))["train"]
    rewards = asyncio.run(train(10))
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    printed = capsys.readouterr().out
    differences = [float(value) for value in re.findall(r"within (\S+),", printed)]
    assert len(differences) == 10
    assert max(differences) < 1e-3
    assert [int(version) for version in re.findall(r"weights (\d+)$", printed, re.MULTILINE)] == list(range(1, 11))

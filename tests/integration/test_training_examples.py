"""The training runs of the examples: rewards rise, and the engine's log probabilities are the trainer's."""

from __future__ import annotations

import asyncio
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mean_reward_of_grpo_rises(capsys: pytest.CaptureFixture[str]) -> None:
    train = runpy.run_path(str(EXAMPLES / "grpo.py"))["train"]
    rewards, _ = asyncio.run(train(10))
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    printed = capsys.readouterr().out
    differences = [float(value) for value in re.findall(r"within (\S+),", printed)]
    assert len(differences) == 10
    assert max(differences) < 1e-3
    assert [int(version) for version in re.findall(r"weights (\d+)$", printed, re.MULTILINE)] == list(range(1, 11))


def test_ppo_raises_the_reward_and_stays_near_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = runpy.run_path(str(EXAMPLES / "ppo.py"))["train"](4)
    rewards, divergences = zip(*rounds, strict=True)
    assert rewards[-1] > rewards[0] + 0.4
    assert divergences[0] == pytest.approx(0, abs=1e-6), "policy and reference begin as one"
    assert 0 < divergences[-1] < 0.6
    assert capsys.readouterr().out.count(" nats per token\n") == 4


def test_plots_of_the_documents_come_from_the_examples(tmp_path: Path) -> None:
    save = runpy.run_path(str(EXAMPLES / "training_plot.py"))["save"]
    save(str(tmp_path / "plot.png"), "a title", [0.1, 0.2], [1e-6, 2e-6], "a label")
    for name in ("grpo", "trl_trainers"):
        assert '"--plot", metavar="FILE"' in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert f"({name}.png)" in (EXAMPLES.parent / "docs" / "training.md").read_text(encoding="utf-8")
        assert (EXAMPLES.parent / "docs" / f"{name}.png").read_bytes()[:4] == (tmp_path / "plot.png").read_bytes()[:4]

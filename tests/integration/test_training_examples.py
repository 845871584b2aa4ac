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
    rewards, _ = asyncio.run(train(10))
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    printed = capsys.readouterr().out
    differences = [float(value) for value in re.findall(r"within (\S+),", printed)]
    assert len(differences) == 10
    assert max(differences) < 1e-3
    assert [int(version) for version in re.findall(r"weights (\d+)$", printed, re.MULTILINE)] == list(range(1, 11))


def test_ppo_raises_the_reward_and_stays_near_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = runpy.run_path(str(EXAMPLES / "ppo.py"))["train"](5)
    rewards, divergences = zip(*rounds, strict=True)
    assert rewards[-1] > rewards[0] + 0.4
    assert divergences[0] == pytest.approx(0, abs=1e-6), "policy and reference begin as one"
    assert 0 < divergences[-1] < 0.6
    assert len(re.findall(r"^round \d: reward \d\.\d\d, divergence \d\.\d{3} nats per token$", capsys.readouterr().out, re.M)) == 5


@pytest.mark.parametrize("name", ["grpo", "trl_trainers"])
def test_plots_of_the_documents_come_from_the_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    save = runpy.run_path(str(EXAMPLES / "training_plot.py"))["save"]
    save(str(tmp_path / f"{name}.png"), "a title", [0.1, 0.2], [1e-6, 2e-6], "a label")
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (EXAMPLES.parent / "docs" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "--plot" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")

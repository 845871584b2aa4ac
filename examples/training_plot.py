"""Draws what a training example measured: mean reward, and how far the trainer is from the engine, step by step."""

import importlib
from collections.abc import Sequence
from typing import Any


def save(path: str, title: str, rewards: Sequence[float], differences: Sequence[float], label: str) -> None:
    """Write a PNG file of two diagrams; the second one, of positive numbers, has a logarithmic axis."""
    try:
        importlib.import_module("matplotlib").use("Agg")  # no display is needed
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'penstock[bench]'") from error
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(range(1, len(rewards) + 1), rewards)
    left.set(title=title, xlabel="step", ylabel="mean reward")
    right.semilogy(range(1, len(differences) + 1), differences)
    right.set(title=label, xlabel="step", ylabel="nats per token")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)

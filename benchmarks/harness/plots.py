"""Curves as a PNG file by matplotlib, an optional dependency; without it there is no picture."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.console import note

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram: named curves of (x, y) over labelled axes; `log_x` for a logarithmic x axis."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Curve]
    log_x: bool = False


def save(path: Path, panels: Sequence[Panel]) -> str | None:
    """Draw the panels side by side; the file's name, or None if matplotlib is missing."""
    try:
        importlib.import_module("matplotlib").use("Agg")  # no display is needed
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        note("no plot: it needs matplotlib (pip install 'penstock[bench]')")
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw(axis, panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    note(f"plot: {path}")
    return str(path)


def _draw(axis: Any, panel: Panel) -> None:
    for name, points in panel.curves.items():
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.log_x:
        measured = sorted({x for points in panel.curves.values() for x, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(measured, [f"{x:g}" for x in measured])
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if panel.curves:
        axis.legend()

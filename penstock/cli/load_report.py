"""What a load showed: a summary of its exchanges, as plain data, as a table, and as plots.

Pure functions, except that `save_plots` writes a file. Called by `penstock bench --url`.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

from rich.table import Table

from penstock.cli.load import Exchange
from penstock.cli.measurements import Percentiles, percentiles
from penstock.errors import ConfigurationError

LATE_S = 0.05  # a generator that sends later than this measures itself
_ROWS = (
    ("first token", "first_token_s"),
    ("between chunks", "inter_chunk_s"),
    ("per token after the first", "per_token_s"),
    ("whole answer", "answer_s"),
)


class LoadSummary(TypedDict):
    """Tokens, rates and times (seconds) are those of complete answers whose clients read without pauses."""

    requests: int
    completed: int
    cut_by_client: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    prompt_tokens: int
    output_tokens: int
    output_tok_s: float
    first_token_s: Percentiles
    inter_chunk_s: Percentiles
    per_token_s: Percentiles
    answer_s: Percentiles
    sent_late_s: Percentiles


def summarize(exchanges: Sequence[Exchange]) -> LoadSummary:
    """The figures of a load."""
    complete = [exchange for exchange in exchanges if exchange.is_complete]
    timed = [exchange for exchange in complete if not exchange.is_slow and exchange.chunks_s]
    duration_s = max((exchange.ended_s for exchange in timed), default=0.0) or 1e-9
    output_tokens = sum(exchange.num_tokens for exchange in timed)
    return {
        "requests": len(exchanges),
        "completed": len(complete),
        "cut_by_client": sum(exchange.is_cut for exchange in exchanges),
        "errors": dict(Counter(exchange.error for exchange in exchanges if exchange.error)),
        "duration_s": round(duration_s, 3),
        "requests_per_s": round(len(timed) / duration_s, 3),
        "prompt_tokens": sum(exchange.num_prompt_tokens for exchange in timed),
        "output_tokens": output_tokens,
        "output_tok_s": round(output_tokens / duration_s, 1),
        "first_token_s": percentiles([_first_token_s(exchange) for exchange in timed]),
        "inter_chunk_s": percentiles(_gaps(timed)),
        "per_token_s": percentiles(list(_per_token_s(timed))),
        "answer_s": percentiles([exchange.ended_s - exchange.sent_s for exchange in timed]),
        "sent_late_s": percentiles([exchange.sent_s - exchange.due_s for exchange in exchanges]),
    }


def _first_token_s(exchange: Exchange) -> float:
    return exchange.chunks_s[0] - exchange.sent_s


def _gaps(exchanges: Sequence[Exchange]) -> list[float]:
    return [after - before for exchange in exchanges for before, after in pairwise(exchange.chunks_s)]


def _per_token_s(exchanges: Sequence[Exchange]) -> Iterator[float]:
    for exchange in exchanges:
        if exchange.num_tokens > 1:
            yield (exchange.chunks_s[-1] - exchange.chunks_s[0]) / (exchange.num_tokens - 1)


def remarks(summary: LoadSummary, is_open: bool) -> list[str]:
    """What a reader of the figures must know."""
    lines = [f"{count} requests failed: {error}" for error, count in summary["errors"].items()]
    late = summary["sent_late_s"]
    if is_open and late and late["p99"] > LATE_S:
        lines.append(
            f"the load generator sent requests up to {late['p99']:.2f} s late (p99): "
            "the machine is too busy for this rate, so the figures are too good"
        )
    return lines


def load_table(summary: LoadSummary, title: str) -> Table:
    """The latencies as a table."""
    table = Table(title=title, title_justify="left")
    for column in ("", "p50", "p95", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for name, key in _ROWS:
        times: Percentiles = summary[key]  # type: ignore[literal-required]
        table.add_row(name, *("" if times is None else f"{1000 * times[p]:,.1f} ms" for p in ("p50", "p95", "p99")))
    return table


def save_plots(path: Path, exchanges: Sequence[Exchange], title: str) -> None:
    """Draw the distributions of the latencies, and tokens over time, as a picture file.

    Raises `ConfigurationError` without matplotlib, and `OSError`.
    """
    pyplot = import_pyplot()
    timed = [exchange for exchange in exchanges if exchange.is_complete and not exchange.is_slow and exchange.chunks_s]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    _draw_shares(axes[0][0], "first token", [1000 * _first_token_s(exchange) for exchange in timed])
    _draw_shares(axes[0][1], "between two chunks", [1000 * gap for gap in _gaps(timed)])
    _draw_shares(axes[1][0], "whole answer", [1000 * (exchange.ended_s - exchange.sent_s) for exchange in timed])
    chunks_s = [time_s for exchange in exchanges for time_s in exchange.chunks_s]
    axes[1][1].hist(chunks_s, bins=max(1, min(200, int(max(chunks_s, default=1)))) or 1)
    axes[1][1].set(title="chunks read over time", xlabel="seconds", ylabel="chunks")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check_plot(path: Path) -> None:
    """Raise `ConfigurationError` if no picture can be saved there."""
    pyplot = import_pyplot()
    formats = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if path.suffix[1:].lower() not in formats:
        raise ConfigurationError(f"--plot {path}: the name must end with one of {', '.join(formats)}")
    if not path.parent.is_dir():
        raise ConfigurationError(f"--plot {path}: there is no folder {path.parent}")


def import_pyplot() -> Any:
    """matplotlib without a display. Raises `ConfigurationError` if it is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise ConfigurationError("--plot needs matplotlib: pip install 'penstock[bench]'") from None


def _draw_shares(axis: Any, title: str, times_ms: list[float]) -> None:
    """The share of values up to each time."""
    times_ms.sort()
    axis.plot(times_ms, [(number + 1) / len(times_ms) for number in range(len(times_ms))])
    axis.set(title=title, xlabel="milliseconds", ylabel="share", ylim=(0, 1.02), xlim=(0, None))
    axis.grid(alpha=0.3)

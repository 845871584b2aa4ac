"""The figures of `penstock bench`: what is measured on the engine, and how repeats become one table and one JSON line.

Never loads anything. Times are seconds; a ratio above 1 says that the engine is faster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from statistics import median
from typing import Any

from rich.table import Table

from penstock.cli.workloads import Work
from penstock.engine.inference import InferenceEngine
from penstock.errors import ExecutionError
from penstock.sampling import SamplingParams

PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Figures:
    """One workload's measurements: an entry in `engine_s` and `baseline_s` per repeat, the others pooled."""

    engine_s: list[float] = field(default_factory=list)
    baseline_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)

    def summary(self, work: Work) -> dict[str, Any]:
        """Medians and percentiles as plain data; what was not measured is None."""
        return {
            "requests": len(work),
            "prompt_tokens": sum(len(prompt) for prompt, _ in work),
            "output_tokens": sum(count for _, count in work),
            "engine": _rates(self.engine_s, work)
            | {"first_token_s": percentiles(self.first_token_s), "inter_token_s": percentiles(self.inter_token_s)},
            "baseline": _rates(self.baseline_s, work) if self.baseline_s else None,
            "ratio": round(median(self.baseline_s) / median(self.engine_s), 3) if self.baseline_s else None,
        }


async def measure_engine(engine: InferenceEngine, work: Work, figures: Figures) -> None:
    """Run all requests at once and note how long it took, and each reader's first and later tokens."""
    begin = time.perf_counter()
    await asyncio.gather(*(_read(engine, prompt, count, figures) for prompt, count in work))
    figures.engine_s.append(time.perf_counter() - begin)


async def _read(engine: InferenceEngine, prompt: list[int], count: int, figures: Figures) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    last, seen = time.perf_counter(), 0
    async for delta in engine.generate(prompt, params):
        if not delta.token_ids:
            continue
        now = time.perf_counter()
        if seen == 0:
            figures.first_token_s.append(now - last)
        else:
            figures.inter_token_s += [(now - last) / len(delta.token_ids)] * len(delta.token_ids)
        last, seen = now, seen + len(delta.token_ids)
    if seen != count:
        raise ExecutionError(
            f"the engine made {seen} tokens where {count} were asked for: this measurement means nothing"
        )


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Nearest-rank percentiles as {"p50": ...}; None of no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{q}": round(ordered[ceil(q * len(ordered) / 100) - 1], 5) for q in PERCENTILES}


def overall_ratio(ratios: Sequence[float]) -> float | None:
    """The geometric mean; None of none."""
    return round(prod(ratios) ** (1 / len(ratios)), 3) if ratios else None


def _rates(seconds: Sequence[float], work: Work) -> dict[str, Any]:
    took = median(seconds)
    output = sum(count for _, count in work)
    total = output + sum(len(prompt) for prompt, _ in work)
    return {"seconds": round(took, 4), "output_tok_s": round(output / took, 1), "total_tok_s": round(total / took, 1)}


def result_table(summaries: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """The summaries for people. Throughput counts new tokens, where there is only one of a request, prompt tokens."""
    table = Table(title=title, title_justify="left")
    for column in (
        "workload",
        "engine tok/s",
        "transformers tok/s",
        "ratio",
        "first token p50",
        "p99",
        "per token p50",
        "p95",
        "p99",
    ):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name, summary in summaries.items():
        table.add_row(name, *_cells(summary))
    return table


def _cells(summary: Mapping[str, Any]) -> list[str]:
    rate = "total_tok_s" if summary["output_tokens"] == summary["requests"] else "output_tok_s"
    engine, baseline, ratio = summary["engine"], summary["baseline"], summary["ratio"]
    first, later = engine["first_token_s"] or {}, engine["inter_token_s"] or {}
    return [
        f"{engine[rate]:,.1f}",
        f"{baseline[rate]:,.1f}" if baseline else "",
        f"{ratio:.2f}x" if ratio else "",
        *(_ms(first.get(name)) for name in ("p50", "p99")),
        *(_ms(later.get(name)) for name in ("p50", "p95", "p99")),
    ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.1f} ms"

"""The measurements of `penstock bench`: what is measured on the engine, and how repeats become a table and a JSON line.

Never loads a model. Times are seconds; a ratio above 1 means that the engine is faster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from statistics import median, quantiles
from typing import TypedDict

from rich.table import Table

from penstock.api.protocols import Engine
from penstock.cli.workloads import Work
from penstock.errors import ExecutionError
from penstock.sampling import SamplingParams

PERCENTILES = (50, 95, 99)
MAX_SPREAD = 0.1  # of the ratios of a workload's repeats; beyond it, the run was disturbed
Percentiles = dict[str, float] | None


class Throughput(TypedDict):
    """Tokens per second over the median time: new tokens, and all tokens. `spread`: see `spread`."""

    seconds: float
    spread: float | None
    output_tok_s: float
    total_tok_s: float


class EngineFigures(Throughput):
    """The engine's throughput and latencies."""

    first_token_s: Percentiles
    inter_token_s: Percentiles


class Summary(TypedDict):
    """One workload's results; None for what was not measured, and for the ratio of a disturbed run."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    engine: EngineFigures
    baseline: Throughput | None
    ratio: float | None
    ratio_spread: float | None


@dataclass(slots=True)
class Measurements:
    """One workload: an entry in `engine_s` and `baseline_s` per repeat, the other times pooled over all repeats."""

    engine_s: list[float] = field(default_factory=list)
    baseline_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)

    def summary(self, work: Work) -> Summary:
        """Medians and percentiles. The ratio compares the two turns of a repeat, which ran one after the other."""
        ratios = [baseline / engine for baseline, engine in zip(self.baseline_s, self.engine_s, strict=False)]
        variation = spread(ratios)
        return {
            "requests": len(work),
            "prompt_tokens": sum(len(prompt) for prompt, _ in work),
            "output_tokens": sum(count for _, count in work),
            "engine": {
                **_throughput(self.engine_s, work),
                "first_token_s": percentiles(self.first_token_s),
                "inter_token_s": percentiles(self.inter_token_s),
            },
            "baseline": _throughput(self.baseline_s, work) if self.baseline_s else None,
            "ratio": round(median(ratios), 3) if variation is not None and variation <= MAX_SPREAD else None,
            "ratio_spread": variation,
        }


async def measure_engine(engine: Engine, work: Work, measurements: Measurements) -> None:
    """Run all requests concurrently and record the total time, and each reader's first and later tokens."""
    start_s = time.perf_counter()
    await asyncio.gather(*(_read(engine, prompt, count, measurements) for prompt, count in work))
    measurements.engine_s.append(time.perf_counter() - start_s)


async def _read(engine: Engine, prompt: list[int], count: int, measurements: Measurements) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    previous_s, num_tokens = time.perf_counter(), 0
    async for delta in engine.generate(prompt, params):
        if not delta.token_ids:
            continue
        now = time.perf_counter()
        if num_tokens == 0:
            measurements.first_token_s.append(now - previous_s)
        else:
            measurements.inter_token_s += [(now - previous_s) / len(delta.token_ids)] * len(delta.token_ids)
        previous_s, num_tokens = now, num_tokens + len(delta.token_ids)
    if num_tokens != count:
        raise ExecutionError(f"the engine generated {num_tokens} tokens instead of {count}: the measurement is invalid")


def percentiles(values: Sequence[float]) -> Percentiles:
    """Nearest-rank percentiles as {"p50": ...}; None if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{q}": round(ordered[ceil(q * len(ordered) / 100) - 1], 5) for q in PERCENTILES}


def spread(values: Sequence[float]) -> float | None:
    """The distance of the quartiles relative to the median; None for fewer than two values."""
    if len(values) < 2:
        return None
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return round((upper - lower) / middle, 3)


def overall_ratio(ratios: Sequence[float | None]) -> float | None:
    """The geometric mean; None if a ratio is missing, or all are."""
    numbers = [ratio for ratio in ratios if ratio is not None]
    return round(prod(numbers) ** (1 / len(numbers)), 3) if numbers and len(numbers) == len(ratios) else None


def disturbance(name: str, summary: Summary) -> str | None:
    """Why a workload that was measured on both sides has no ratio, in a sentence; None if it has one."""
    if summary["baseline"] is None or summary["ratio"] is not None:
        return None
    variation = summary["ratio_spread"]
    if variation is None:
        return f"no ratio for {name}: one repeat does not show how much the machine varies; use --repeats 3 or more"
    return (
        f"no ratio for {name}: the ratios of its repeats spread by {variation:.0%}, more than {MAX_SPREAD:.0%}, so the "
        "run was disturbed: close other programs, or raise --repeats"
    )


def _throughput(seconds: Sequence[float], work: Work) -> Throughput:
    median_s = median(seconds)
    output = sum(count for _, count in work)
    total = output + sum(len(prompt) for prompt, _ in work)
    return {
        "seconds": round(median_s, 4),
        "spread": spread(seconds),
        "output_tok_s": round(output / median_s, 1),
        "total_tok_s": round(total / median_s, 1),
    }


def result_table(summaries: Mapping[str, Summary], title: str) -> Table:
    """The summaries as a table, spreads in brackets.

    Throughput counts new tokens, or all tokens if every request has only one new token.
    """
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


def _cells(summary: Summary) -> list[str]:
    engine, baseline = summary["engine"], summary["baseline"]
    ratio, variation = summary["ratio"], summary["ratio_spread"]
    is_prefill = summary["output_tokens"] == summary["requests"]
    first_token, inter_token = engine["first_token_s"] or {}, engine["inter_token_s"] or {}
    return [
        _rate(engine, is_prefill),
        _rate(baseline, is_prefill) if baseline else "",
        (f"{ratio:.2f}x" if ratio else "disturbed" if variation else "") + _percent(variation),
        *(_ms(first_token.get(name)) for name in ("p50", "p99")),
        *(_ms(inter_token.get(name)) for name in ("p50", "p95", "p99")),
    ]


def _rate(throughput: Throughput, is_prefill: bool) -> str:
    return f"{throughput['total_tok_s' if is_prefill else 'output_tok_s']:,.1f}" + _percent(throughput["spread"])


def _percent(share: float | None) -> str:
    return "" if share is None else f" ({share:.0%})"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.1f} ms"

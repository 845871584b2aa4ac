"""From measurements to the results of a comparison: medians over runs, ratios of medians, fractions of the hardware.

Pure functions of records. Rates are new tokens per second, or all tokens per second if each request has only one new
token. A ratio above 1 means that this engine is faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from statistics import median
from typing import Any

from harness.footprint import Footprint
from harness.results import Record, Results

Rates = Mapping[str, Mapping[str, Sequence[float]]]  # engine -> workload -> one per run
DECODE, PREFILL = "single", "prefill"  # the workloads compared with the limits of memory and arithmetic


def summarize(results: Results, model: str, workloads: Sequence[str]) -> dict[str, Any]:
    """The contents of a report on one model."""
    footprint = next((Footprint(**record["shape"]) for record in results.of(model, "footprint")), None)
    records = [record for record in results.of(model, "rate") if record["workload"] in workloads]
    rates, machine = rates_of(records), machine_of(results.of(model, "machine"))
    engines = {record["engine"]: record for record in records}
    ours = [name for name, record in engines.items() if record["own"]]
    peers = [name for name in engines if name not in ours]
    return {
        "model": model,
        "runs": len({record.get("run") for record in records}),
        "days": sorted({record["time"][:10] for record in records}),
        "machine": machine,
        "requests": requests_of(records),
        "engines": {name: about(name, results, model, rates[name], engines[name]) for name in [*ours, *peers]},
        "ratios": {mine: {peer: ratios(rates[mine], rates[peer]) for peer in peers} for mine in ours},
        "roofline": {name: fractions(rates[name], engines[name], machine, footprint) for name in [*ours, *peers]},
    }


def value_of(record: Record) -> float:
    """Tokens per second of one measurement."""
    only_prefill = record["output_tokens"] == record["requests"]
    return float(record["total_tok_s" if only_prefill else "output_tok_s"])


def rates_of(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """By engine and workload, in order of appearance."""
    rates: dict[str, dict[str, list[float]]] = {}
    for record in records:
        rates.setdefault(record["engine"], {}).setdefault(record["workload"], []).append(value_of(record))
    return rates


def requests_of(records: Sequence[Record]) -> dict[str, str]:
    """The sizes of each workload, in words."""
    return {
        record["workload"]: f"{record['requests']} x {record['prompt_tokens'] / record['requests']:.0f} + "
        f"{record['output_tokens'] / record['requests']:.0f}"
        for record in records
    }


def machine_of(records: Sequence[Record]) -> dict[str, Any]:
    """The facts of the newest run, with the limits' medians over all of them."""
    if not records:
        return {}
    facts = {name: value for name, value in records[-1].items() if name not in ("model", "run", "kind", "time")}
    return facts | {name: median_of(records, name) for name in ("read_bytes_s", "bf16_ops_s", "int8_ops_s")}


def median_of(records: Sequence[Record], name: str) -> float | None:
    """The median of a value over the records that have it."""
    values = [record[name] for record in records if record.get(name) is not None]
    return round(median(values), 3) if values else None


def about(
    name: str, results: Results, model: str, rates: Mapping[str, Sequence[float]], record: Record
) -> dict[str, Any]:
    """One engine: median rates, the spread of the runs, time to load, memory."""
    loads, memories = ([r for r in results.of(model, kind) if r["engine"] == name] for kind in ("load", "memory"))
    return {
        "precision": record["precision"],
        "own": record["own"],
        "rates": {workload: round(median(values), 2) for workload, values in rates.items()},
        "spread": round(max((max(v) - min(v)) / median(v) for v in rates.values()), 3),
        "load_s": median_of(loads, "load_s"),
        "peak_rss_bytes": median_of(memories, "peak_rss_bytes"),
    }


def ratios(mine: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Ratio of medians by workload, and their geometric mean as `mean`."""
    values = {name: median(mine[name]) / median(theirs[name]) for name in mine if name in theirs}
    if values:
        values["mean"] = prod(values.values()) ** (1 / len(values))
    return {name: round(value, 3) for name, value in values.items()}


def fractions(
    rates: Mapping[str, Sequence[float]], record: Record, machine: Mapping[str, Any], footprint: Footprint | None
) -> dict[str, float]:
    """The fractions of the machine's limits that one stream and one prompt reach, as far as they are known."""
    results: dict[str, float] = {}
    precision, limit = record["precision"], machine.get("read_bytes_s")
    if footprint and limit and DECODE in rates:
        results["read_bytes_s"] = footprint.read_bytes(precision) * median(rates[DECODE])
        results["read_fraction"] = round(results["read_bytes_s"] / limit, 3)
    limit = machine.get(f"{precision}_ops_s")
    if footprint and limit and PREFILL in rates:
        tokens = prefill_tokens()
        per_second = median(rates[PREFILL]) / (tokens + 1)
        results["ops_s"] = footprint.prefill_operations(tokens) * per_second
        results["ops_fraction"] = round(results["ops_s"] / limit, 3)
    return results


def prefill_tokens() -> int:
    """Prompt tokens of the prefill workload."""
    from peers.workloads import WORKLOADS

    return WORKLOADS[PREFILL].unique

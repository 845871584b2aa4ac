"""A comparison as Markdown: a pure function of its summary. Called by `compare`, which owns the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.console import cell

PRECISIONS = {"bf16": "bfloat16", "int8": "int8 weights"}


def render(summary: Mapping[str, Any], command: str) -> str:
    """The whole document; `command` repeats the comparison."""
    parts = [
        introduction(summary),
        throughput(summary),
        *(ratio_table(name, summary) for name in summary["ratios"]),
        roofline(summary),
        loading(summary),
        f"## Measure it yourself\n\n```\n{command}\n```\n\n"
        "`python benchmarks/compare.py --help` explains how to set up the other engines. An interrupted comparison\n"
        "resumes where it stopped.\n",
    ]
    return "\n".join(part for part in parts if part)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with numbers aligned to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *([cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def introduction(summary: Mapping[str, Any]) -> str:
    """What was measured, when and where."""
    days = summary["days"]
    dates = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "never"
    return (
        "# Performance\n\n"
        f"The model is {summary['model']}; {dates}; runs: {summary['runs']}. In each run every engine is measured\n"
        "once, in a process of its own, one after the other in rotating order. Figures are medians over the runs.\n"
        "All engines get the same token ids, greedy sampling, and exactly the same number of new tokens.\n\n"
        f"{machine_lines(summary['machine'])}"
    )


def machine_lines(machine: Mapping[str, Any]) -> str:
    """The machine as a list."""
    if not machine:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['ram_bytes'] / 2**30:.0f} GiB; "
        f"{', '.join(machine['features']) or 'no relevant features'}\n"
        f"- {machine['system']}; {versions}; threads: {machine['threads']}\n"
        f"- measured in the same runs: reads {giga(machine['read_bytes_s'])} GB/s, matrix products in bfloat16 "
        f"{giga(machine['bf16_ops_s'])} GFLOP/s, in int8 {giga(machine['int8_ops_s'])} GOP/s\n"
    )


def giga(value: float | None) -> str:
    """Billions."""
    return "?" if value is None else cell(value / 1e9)


def throughput(summary: Mapping[str, Any]) -> str:
    """Engines by workloads."""
    names = list(summary["requests"])
    rows = [
        [name, PRECISIONS[entry["precision"]], *(entry["rates"].get(n) for n in names), f"{entry['spread']:.0%}"]
        for name, entry in summary["engines"].items()
    ]
    sizes = "; ".join(f"{name}: {size}" for name, size in summary["requests"].items())
    return (
        "## Tokens per second\n\nNew tokens; all tokens where a request has only one new token. Spread is the\n"
        "largest difference between runs, relative to the median.\n\n"
        f"{markdown_table(('engine', 'weights', *names, 'spread'), rows)}\n"
        f"Requests x prompt tokens + new tokens of each (on average) - {sizes}.\n"
    )


def ratio_table(name: str, summary: Mapping[str, Any]) -> str:
    """How many times as fast as each peer."""
    peers = summary["ratios"][name]
    if not peers:
        return ""
    columns = [*summary["requests"], "mean"]
    rows = [
        [f"{peer} ({summary['engines'][peer]['precision']})", *map(entry.get, columns)] for peer, entry in peers.items()
    ]
    return (
        f"## {name} compared with each\n\nRatios of medians; above 1, {name} is faster. The mean is geometric.\n\n"
        f"{markdown_table(('engine', *columns), rows)}"
    )


def roofline(summary: Mapping[str, Any]) -> str:
    """How close the engines come to the limits of the machine."""
    rows = [
        [
            name,
            entry["read_bytes_s"] / 1e9 if "read_bytes_s" in entry else None,
            percent(entry.get("read_fraction")),
            entry["ops_s"] / 1e9 if "ops_s" in entry else None,
            percent(entry.get("ops_fraction")),
        ]
        for name, entry in summary["roofline"].items()
    ]
    if not any(summary["roofline"].values()):
        return ""
    return (
        "## Limits of the machine\n\nOne stream reads all weights for each token, so memory limits it: bytes of the\n"
        "weights times tokens per second (`single`), and the fraction of the measured bandwidth. A prompt is limited\n"
        "by arithmetic: operations of its matrix products per second (`prefill`), and the fraction of the measured\n"
        "rate in the precision of the weights.\n\n"
        f"{markdown_table(('engine', 'single, GB/s', 'of bandwidth', 'prefill, GFLOP/s', 'of rate'), rows)}"
    )


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return "" if value is None else f"{value:.0%}"


def loading(summary: Mapping[str, Any]) -> str:
    """Time to load, and memory."""
    rows = [
        [name, entry["load_s"], round(entry["peak_rss_bytes"] / 2**20) if entry["peak_rss_bytes"] else None]
        for name, entry in summary["engines"].items()
    ]
    return (
        "## Loading, and memory\n\nSeconds from the start of the process until it accepts requests, imports included;\n"
        "the peak of its memory, K/V cache included.\n\n"
        f"{markdown_table(('engine', 'load, s', 'peak, MiB'), rows)}"
    )

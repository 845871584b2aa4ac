"""`penstock doctor`: what this machine has, what the engine makes of it, and what to do about what is wrong.

Owns the order of examinations; one that fails is a finding and stops none of the others. Never changes anything.
Called by `command`; exit code 1 when something is broken.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from penstock.cli.examinations import examine
from penstock.cli.findings import Finding, find_problems
from penstock.cli.options import add_device_options, engine_settings
from penstock.cli.session import leaving_at_once
from penstock.cli.terminal import waiting_for, write
from penstock.config import EngineConfig

BROKEN = 1
EXAMPLES = """examples:
  penstock doctor
  penstock doctor --device cpu --dtype float32 --json | jq .speed

Takes some seconds: it measures memory and matrix products, then runs the
built-in model. Exit code 1 means that something is broken; what to do about it
is printed last.
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="examine hardware, versions and speed",
        description="Examine hardware, library versions, memory and speed, and say what to change.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_device_options(parser.add_argument_group("model"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises `ConfigurationError` for impossible settings; returns the exit code."""
    config = EngineConfig(**engine_settings(args))
    with leaving_at_once(), waiting_for("examining ..."):
        report, failures = examine(config)
    findings = [*failures, *find_problems(report)]
    broken = any(finding.broken for finding in findings)
    if args.json:
        problems = [finding.as_json() for finding in findings]
        write(json.dumps(report | {"problems": problems, "ok": not broken}, ensure_ascii=False) + "\n")
    else:
        write(as_text(report, findings))
    return BROKEN if broken else 0


def as_text(report: dict[str, dict[str, Any]], findings: list[Finding]) -> str:
    """The report for people, problems last."""
    lines: list[str] = []
    for section, facts in report.items():
        lines += [section, *(f"  {label(name):<24}{shown(name, value)}" for name, value in facts.items())]
    lines.append("problems" if findings else "no problems found")
    for finding in findings:
        lines += [f"  {'BROKEN' if finding.broken else 'note'}: {finding.problem}", f"    {finding.remedy}"]
    return "\n".join(lines) + "\n"


def label(name: str) -> str:
    """A name for people, without the unit."""
    for unit in UNITS:
        name = name.removesuffix(f"_{unit}")
    return name.replace("_", " ")


def shown(name: str, value: Any) -> str:
    """A value with its unit, which its name ends with."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(", ".join(shown(key, item) for key, item in entry.items()) for entry in value)
    return next((show(value) for unit, show in UNITS.items() if name.endswith(f"_{unit}")), f"{value:,}")


def _size(count: float) -> str:
    power = next(power for power in (30, 20, 10, 0) if count >= 2**power or power == 0)
    return f"{count / 2**power:,.1f} {({30: 'GiB', 20: 'MiB', 10: 'KiB', 0: 'bytes'})[power]}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


# What names end with -> how to say such a value. The first that fits holds.
UNITS: dict[str, Callable[[float], str]] = {
    "gb_per_s": lambda rate: f"{rate:,.1f} GB/s",
    "gflop_per_s": lambda rate: f"{rate:,.1f} GFLOP/s",
    "tokens_per_s": lambda rate: f"{rate:,.1f} tokens/s",
    "bytes": _size,
    "s": _time,
}

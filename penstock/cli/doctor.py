"""`penstock doctor`: reports on this machine and how fast the engine runs on it, and says what to change.

Owns the form of the report. Never changes anything. Called by `command`; exit code 1 if something is broken.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from penstock.cli.inspection import inspect_machine
from penstock.cli.options import add_device_options, engine_settings
from penstock.cli.problems import Problem, Report, find_problems
from penstock.cli.session import exit_on_interrupt
from penstock.cli.terminal import status_line, write
from penstock.config import EngineConfig

BROKEN = 1
EXAMPLES = """examples:
  penstock doctor
  penstock doctor --device cpu --dtype float32 --json | jq .speed

It takes a few seconds: it measures memory bandwidth and matrix products, then runs
the built-in model. Problems and their remedies are printed last. Exit code 1 means
that the engine cannot work like this.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="check hardware, library versions and speed",
        description="Check hardware, library versions, memory and speed, and suggest remedies.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_device_options(parser.add_argument_group("model"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises `ConfigurationError` for invalid settings; returns the exit code."""
    config = EngineConfig(**engine_settings(args))
    with exit_on_interrupt(), status_line("checking ..."):
        report, failures = inspect_machine(config)
    problems = [*failures, *find_problems(report)]
    is_broken = any(problem.is_fatal for problem in problems)
    if args.json:
        document = {**report, "problems": [problem.as_json() for problem in problems], "ok": not is_broken}
        write(json.dumps(document, ensure_ascii=False) + "\n")
    else:
        write(as_text(report, problems))
    return BROKEN if is_broken else 0


def as_text(report: Report, problems: list[Problem]) -> str:
    """The report as text, problems last."""
    lines: list[str] = []
    for section, facts in report.items():
        lines += [section, *(f"  {label(name):<24}{formatted(name, value)}" for name, value in facts.items())]
    lines.append("problems" if problems else "no problems found")
    for problem in problems:
        lines += [f"  {'BROKEN' if problem.is_fatal else 'note'}: {problem.description}", f"    {problem.remedy}"]
    return "\n".join(lines) + "\n"


def label(name: str) -> str:
    """A readable name, without the unit."""
    for unit in UNITS:
        name = name.removesuffix(f"_{unit}")
    return name.replace("_", " ")


def formatted(name: str, value: object) -> str:
    """A value with its unit, which is the end of its name."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(", ".join(formatted(key, item) for key, item in entry.items()) for entry in value)
    assert isinstance(value, int | float)
    return next((form(value) for unit, form in UNITS.items() if name.endswith(f"_{unit}")), f"{value:,}")


def _size(count: float) -> str:
    power = next(power for power in (30, 20, 10, 0) if count >= 2**power or power == 0)
    return f"{count / 2**power:,.1f} {({30: 'GiB', 20: 'MiB', 10: 'KiB', 0: 'bytes'})[power]}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


# The end of a name -> the form of its value. The first that matches applies.
UNITS: dict[str, Callable[[float], str]] = {
    "gb_per_s": lambda rate: f"{rate:,.1f} GB/s",
    "gflop_per_s": lambda rate: f"{rate:,.1f} GFLOP/s",
    "tokens_per_s": lambda rate: f"{rate:,.1f} tokens/s",
    "bytes": _size,
    "s": _time,
}

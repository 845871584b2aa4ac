"""How fast is this engine beside the others that one could pick?

Sittings: in each one every engine runs the workloads once, in a fresh process, one at a time, in an order that
rotates. Medians over the sittings are compared, so that a machine that is slower at times is slower for everybody.
What the machine can do at most is measured in the same sittings.

Every measurement is appended to a file as it is taken. A run that was cut off goes on where it stopped; what is in the
file is not measured again, so after a change of this engine name another file. --report-only makes the report from what
is there. The report goes to docs/performance.md, where sections of other benchmarks stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.comparing import add_options, engines_of, model_name, plan_of, results_of
from harness.console import finish, note, show
from harness.options import parser_for
from harness.processes import ROOT
from harness.report import render
from harness.sections import kept
from harness.sittings import hold
from harness.summary import summarize
from peers.workloads import WORKLOADS, parse

EPILOG = """peers, each in a virtual environment of its own (peers/run_*.py say how to make it):
  --peers peers.toml             a file, see benchmarks/peers/peers.toml
  --peer vllm=/path/bin/python   or one by one; KIND=PYTHON,MODEL where it needs a folder of its own

examples:
  python benchmarks/compare.py --peers benchmarks/peers/peers.toml --sittings 3
  python benchmarks/compare.py --peer transformers=python --workloads single,batch8 --sittings 1
  python benchmarks/compare.py --report-only
"""
COMMAND = "python benchmarks/compare.py --peers benchmarks/peers/peers.toml"


def command(args: argparse.Namespace) -> str:
    """What measures the same again: the settings of this engine, sittings and repeats as they were given."""
    settings = "".join(f" --set {setting}" for setting in args.set)
    return f"{COMMAND} --sittings {args.sittings} --repeats {args.repeats}{settings}"


def print_ratios(found: dict[str, Any]) -> None:
    """A table for each of our engines."""
    for name, peers in found["ratios"].items():
        columns = [*found["requests"], "mean"]
        rows = [[peer, *map(ratio.get, columns)] for peer, ratio in peers.items()]
        show(f"{name} is so many times as fast as", ("engine", *columns), rows)


def main() -> None:
    """Measure what is missing, then report."""
    parser = parser_for(__doc__, EPILOG)
    add_options(parser, "compare.jsonl")
    parser.add_argument("--workloads", type=parse, metavar="W,W", default=list(WORKLOADS.values()), help="default: all")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", default=ROOT / "docs" / "performance.md", help="docs/performance.md"
    )
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure, and write the report."""
    results, model = results_of(args), model_name(args)
    if not args.report_only:
        hold(plan_of(args, args.workloads), engines_of(args), results)
    found = summarize(results, model, [workload.name for workload in args.workloads])
    if not found["engines"]:
        raise SystemExit(f"there is no measurement of {model} in {results.path}")
    print_ratios(found)
    others = kept(args.report.read_text(encoding="utf-8")) if args.report.exists() else ""
    text = render(found, command(args)) + (f"\n{others}" if others else "")
    args.report.write_text(text, encoding="utf-8")
    note(f"measurements: {results.path}\nreport: {args.report}")
    finish(found)


if __name__ == "__main__":
    main()

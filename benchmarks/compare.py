"""How fast is this engine compared with other engines?

In each run every engine measures the workloads once, in a fresh process, one engine at a time, in rotating order.
Medians over the runs are compared, so that a machine that is slower at times is slower for every engine. The limits of
the machine are measured in the same runs.

Every measurement is appended to a file as it is taken, and an interrupted comparison resumes where it stopped. What the
file contains is not measured again, so name another file after a change of this engine. --report writes a document, in
which the sections of other benchmarks stay as they are; --report-only writes it from the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.comparing import add_options, engines_of, model_name, plan_of, results_of
from harness.console import finish, note, show
from harness.options import parser_for
from harness.report import render
from harness.runs import measure_runs
from harness.sections import sections_of
from harness.summary import summarize
from peers.workloads import WORKLOADS, parse

EPILOG = """peers, each in a virtual environment of its own (peers/run_*.py say how to make it):
  --peers peers.toml             a file, see benchmarks/peers/peers.toml
  --peer vllm=/path/bin/python   or one by one; KIND=PYTHON,MODEL where it needs a folder of its own

examples:
  python benchmarks/compare.py --peers benchmarks/peers/peers.toml --runs 3
  python benchmarks/compare.py --peer transformers=python --workloads single,batch8 --runs 1
  python benchmarks/compare.py --report-only --report docs/performance.md
"""
COMMAND = "python benchmarks/compare.py --peers benchmarks/peers/peers.toml"


def command(args: argparse.Namespace) -> str:
    """The command that repeats the comparison, with the same settings, runs and repeats."""
    settings = "".join(f" --set {setting}" for setting in args.set)
    return f"{COMMAND} --runs {args.runs} --repeats {args.repeats}{settings}"


def print_tables(summary: dict[str, Any]) -> None:
    """The rates of all engines, and for each of ours the ratios to the others, if there are any."""
    names = list(summary["requests"])
    rates = [[engine, *map(entry["rates"].get, names)] for engine, entry in summary["engines"].items()]
    show("tokens per second", ("engine", *names), rates)
    for name, peers in summary["ratios"].items():
        rows = [[peer, *map(ratio.get, (*names, "mean"))] for peer, ratio in peers.items()]
        if rows:
            show(f"speed of {name} relative to", ("engine", *names, "mean"), rows)


def main() -> None:
    """Measure what is missing, then report."""
    parser = parser_for(__doc__, EPILOG)
    add_options(parser, "compare.jsonl")
    parser.add_argument("--workloads", type=parse, metavar="W,W", default=list(WORKLOADS.values()), help="default: all")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report, as docs/performance.md is one")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure, print the results, and write the report if there is to be one."""
    results, model = results_of(args), model_name(args)
    if not args.report_only:
        measure_runs(plan_of(args, args.workloads), engines_of(args), results)
    summary = summarize(results, model, [workload.name for workload in args.workloads])
    if not summary["engines"]:
        raise SystemExit(f"there is no measurement of {model} in {results.path}")
    print_tables(summary)
    note(f"measurements: {results.path}")
    if args.report:
        other_sections = sections_of(args.report.read_text(encoding="utf-8")) if args.report.exists() else ""
        text = render(summary, command(args)) + (f"\n{other_sections}" if other_sections else "")
        args.report.write_text(text, encoding="utf-8")
        note(f"report: {args.report}")
    finish(summary)


if __name__ == "__main__":
    main()

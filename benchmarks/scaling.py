"""How does throughput grow with concurrent requests, and how does it fall with the length of the context?

Two curves per engine. Concurrency: 1 to 64 concurrent requests of the same size, new tokens per second in total.
Context: one request with a prompt of up to 8,000 tokens, prompt tokens per second during prefill and new tokens per
second after it. Prefill is timed by a request for one new token; the additional time of more tokens is decoding.

Engines, files and resuming are as in `compare.py`: measurements are appended as they are taken. --merge adds curves
that were measured elsewhere, from files of the same kind. The curves go into a PNG file and the last line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from harness.comparing import add_options, engines_of, model_folder, model_name, plan_of, results_of
from harness.console import finish, note, show
from harness.options import integers, parser_for
from harness.plots import Panel, save
from harness.results import Record, read_lines
from harness.runs import measure_runs
from peers.workloads import Workload

EPILOG = """examples:
  python benchmarks/scaling.py --own penstock-bf16 --runs 1
  python benchmarks/scaling.py --peers benchmarks/peers/peers.toml --concurrency 1,8,64 --contexts ""
  python benchmarks/scaling.py --runs 0 --merge elsewhere.jsonl --plot both.png      # only draw
"""
Curves = dict[str, dict[str, list[tuple[int, float]]]]
TITLES = {
    "concurrency": ("many requests", "concurrent requests", "new tok/s, all together"),
    "prefill": ("reading a prompt", "prompt tokens", "prompt tok/s"),
    "decode": ("writing after it", "prompt tokens", "new tok/s"),
}


def sized(requests: int, prompt: int, output: int) -> Workload:
    """A workload with a name that the runners understand."""
    return Workload(f"{requests}x{prompt}+{output}", requests, 0, prompt, output)


def seconds_of(records: list[Record]) -> dict[str, dict[str, float]]:
    """Median seconds by engine and workload."""
    times: dict[str, dict[str, list[float]]] = {}
    for record in records:
        times.setdefault(record["engine"], {}).setdefault(record["workload"], []).append(record["seconds"])
    return {engine: {name: median(values) for name, values in by.items()} for engine, by in times.items()}


def curves_of(seconds: dict[str, dict[str, float]], args: argparse.Namespace) -> Curves:
    """Curves by kind and engine: (requests or prompt tokens, tokens per second) of the points that were measured."""
    curves: Curves = {kind: {} for kind in TITLES}
    for engine, by in seconds.items():
        for requests in args.concurrency:
            if took := by.get(sized(requests, args.prompt, args.output).name):
                put(curves, "concurrency", engine, requests, requests * args.output / took)
        for context in args.contexts:
            single, longer = (by.get(sized(1, context, count).name) for count in (1, 1 + args.output))
            if single:
                put(curves, "prefill", engine, context, context / single)
            if single and longer and longer > single:
                put(curves, "decode", engine, context, args.output / (longer - single))
    return curves


def put(curves: Curves, kind: str, engine: str, x: int, y: float) -> None:
    """Add a point."""
    curves[kind].setdefault(engine, []).append((x, round(y, 2)))


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """The workloads for all points of all curves; a context needs two."""
    concurrent = [sized(requests, args.prompt, args.output) for requests in args.concurrency]
    long_contexts = [sized(1, context, count) for context in args.contexts for count in (1, 1 + args.output)]
    return [*concurrent, *long_contexts]


def within(folder: Path, contexts: list[int], output: int) -> list[int]:
    """The contexts within the positions of the model in a folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    limit = config.get("text_config", config).get("max_position_embeddings") or max(contexts, default=0) + output + 1
    fitting = [context for context in contexts if context + output + 1 <= limit]
    if fitting != contexts:
        note(f"contexts beyond the model's {limit} positions are left out")
    return fitting


def optional_integers(text: str) -> list[int]:
    """Numbers, or none."""
    return integers(text) if text.strip() else []


def main() -> None:
    """Measure what is missing, then draw."""
    parser = parser_for(__doc__, EPILOG)
    add_options(parser, "scaling.jsonl")
    curve = parser.add_argument_group("curves")
    curve.add_argument(
        "--concurrency", type=optional_integers, default=[1, 2, 4, 8, 16, 32, 64], metavar="N,N", help="requests"
    )
    curve.add_argument(
        "--contexts", type=optional_integers, default=[128, 512, 1000, 2000, 4000, 8000], metavar="N,N", help="tokens"
    )
    curve.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens, for concurrency (default: 128)")
    curve.add_argument("--output", type=int, default=32, metavar="N", help="new tokens (default: 32)")
    curve.add_argument("--merge", type=Path, action="append", default=[], metavar="FILE", help="more measurements")
    curve.add_argument("--plot", type=Path, default=Path("scaling.png"), metavar="FILE", help="default: scaling.png")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure, merge, draw."""
    results, model = results_of(args), model_name(args)
    if args.runs:
        args.contexts = within(model_folder(args), args.contexts, args.output)
        measure_runs(plan_of(args, workloads_of(args)), engines_of(args), results)
    for file in args.merge:
        results.merge(read_lines(file.read_text(encoding="utf-8").splitlines()))
    curves = curves_of(seconds_of(results.of(model, "rate")), args)
    for kind, by in ((kind, by) for kind, by in curves.items() if by):
        xs = sorted({x for points in by.values() for x, _ in points})
        rows = [[engine, *map(dict(points).get, xs)] for engine, points in by.items()]
        show(f"{model}: {TITLES[kind][0]}, {TITLES[kind][2]}", ("engine", *map(str, xs)), rows)
    panels = [Panel(*TITLES[kind], curves=by, log_x=True) for kind, by in curves.items() if by]
    plot = save(args.plot, panels) if panels else None
    finish({"model": model, "results": str(results.path), "plot": plot, "curves": curves})


if __name__ == "__main__":
    main()

"""`penstock bench`: the engine against `transformers.generate`, in one run, on the same weights. `--url`: `bench_url`.

Each side loads the model as its user does: the engine from the folder or hub id, with its kernels and rewrites. Owns
the order of measurements: the sides take turns within every repeat, and change places from one to the next, so that a
machine that slows down slows both. Never reuses token ids. The table goes to stderr, one JSON line to stdout. Called by
`command`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from penstock import __version__
from penstock.cli.measurements import Measurements, Summary, disturbance, measure_engine, overall_ratio, result_table
from penstock.cli.options import add_load_options, add_model_options, engine_settings, names_from, positive
from penstock.cli.session import (
    JsonObject,
    exit_on_interrupt,
    new_runner,
    quiet_libraries,
    run_on_own_thread,
    started_engine,
)
from penstock.cli.terminal import note, print_table, progress_bar, status_line, write
from penstock.cli.workloads import WARM_UP, WORKLOADS, Work, Workload, cache_tokens
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.engine.inference import InferenceEngine
from penstock.errors import ConfigurationError
from penstock.models.baseline import SHAPES, Baseline, load_module, random_module

EXAMPLES = """workloads (requests x prompt tokens -> new tokens of each):
  single    1 x 16 -> 64       latency of a single stream
  prefill   1 x 512 -> 1       prefill of one prompt
  batch8    8 x 128 -> 64      a few streams
  batch32   32 x 128 -> 64     many streams
  ragged32  32 x 32..256 -> 12..96, lengths differ between requests
  prefix32  32 x (512 shared + 32) -> 32

examples:
  penstock bench --model ./my-model --repeats 5
  penstock bench --shape qwen3-0.6b --workloads single,batch8 | jq .ratio
  penstock bench --url http://127.0.0.1:8000 --rate 4 --requests 200 --plot load.png

A ratio above 1 means that the engine is faster; it is the median over the repeats,
in each of which engine and transformers take turns. The spread, in brackets, is the
middle half of the repeats, relative to the median. Where the ratios of the repeats spread by more
than 10 %, something else used the machine: no ratio is printed. transformers runs a
static batch with left padding and sdpa attention. No two repeats have the same token
ids. Both sides are in memory, so the weights need room twice.
"""
TASKS_PER_REPEAT = 2


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "bench",
        help="compare this engine with transformers.generate, or load a server",
        description="Compare the engine with transformers.generate in one run, on the same weights. "
        "With --url, measure a server under load instead.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = add_model_options(parser)
    model.add_argument(
        "--shape", choices=tuple(SHAPES), help="random bfloat16 weights of this shape instead of a model"
    )
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--workloads", metavar="W,W", default=",".join(WORKLOADS), help="workloads to run (default: all)"
    )
    group.add_argument("--repeats", type=positive, metavar="N", default=5, help="repeats for the median (default: 5)")
    group.add_argument("--skip-baseline", action="store_true", help="measure the engine only")
    add_load_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code."""
    if args.url:
        return _load_server(args)
    if args.shape and args.model:
        raise ConfigurationError("--shape and --model exclude each other: give one of them")
    if args.plot or args.concurrency or args.rate != math.inf:
        raise ConfigurationError("--plot, --concurrency and --rate are for the load on a server: add --url")
    chosen = [WORKLOADS[name] for name in names_from(args.workloads, tuple(WORKLOADS))]
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        return _run(args, chosen, Path(folder))


def _load_server(args: argparse.Namespace) -> int:
    if args.shape:
        raise ConfigurationError("--shape and --url exclude each other: give one of them")
    if importlib.util.find_spec("httpx") is None:
        raise ConfigurationError("--url needs an HTTP client: pip install 'penstock[client]'")
    from penstock.cli import bench_url

    return bench_url.run(args)


def _run(args: argparse.Namespace, chosen: list[Workload], folder: Path) -> int:
    """The measurements. Random weights of a shape are saved in `folder`, so that both sides load them from there."""
    name = args.shape or args.model or str(MODEL_DIR)
    source = str(folder) if args.shape else name
    with exit_on_interrupt(), status_line(f"loading {name}"):
        baseline, load_s = run_on_own_thread(_load_baseline, args, folder)
    config = EngineConfig(**engine_settings(args))
    workloads, notes = fit(chosen, min(baseline.max_length, config.max_sequence_length or baseline.max_length))
    works = [workload.draw(0, baseline.vocab_size) for workload in workloads]
    tokens = config.kv_cache_tokens or cache_tokens(works, config.block_size)
    engine = EngineRuns(source, {**engine_settings(args), "kv_cache_tokens": tokens})
    with new_runner() as runner:
        summaries = _measure(args, workloads, baseline, engine, runner)
    facts = conditions(name, baseline) | {"kernels": engine.kernels, "repeats": args.repeats, "load_s": load_s}
    notes += [line for workload, summary in summaries.items() if (line := disturbance(workload, summary))]
    _report(summaries, facts | {"notes": notes})
    return 0


def fit(chosen: list[Workload], limit: int) -> tuple[list[Workload], list[str]]:
    """The workloads within a model's context, and a note for each that had to be reduced."""
    workloads = [workload.fitted(limit) for workload in chosen]
    return workloads, [
        f"{reduced.name} is reduced from {original.max_length} to {reduced.max_length} tokens per request, "
        f"because the model's limit is {limit}"
        for original, reduced in zip(chosen, workloads, strict=True)
        if original != reduced
    ]


def _load_baseline(args: argparse.Namespace, folder: Path) -> tuple[Baseline, float]:
    quiet_libraries()
    config = EngineConfig(**engine_settings(args))
    if args.shape:
        random_module(args.shape, config).save_pretrained(folder)
    start_s = time.perf_counter()
    module = load_module(folder if args.shape else args.model or MODEL_DIR, config)
    return Baseline(module), round(time.perf_counter() - start_s, 2)


@dataclass(slots=True)
class EngineRuns:
    """Loads the engine for each of its turns: a folder or hub id, with the settings of the command line.

    It exists only for its turn, see `run_on_own_thread`. `kernels` describes what it computed with.
    """

    source: str
    settings: JsonObject
    kernels: str | None = None

    def measure(self, runner: asyncio.Runner, warm_up: Work, work: Work, measurements: Measurements) -> None:
        """Run and record `work` on a new engine that has run `warm_up`."""
        engine = InferenceEngine(self.source, None, skip_tokenizer_init=True, **self.settings)
        with started_engine(engine):
            runner.run(measure_engine(engine, warm_up, Measurements()))
            runner.run(measure_engine(engine, work, measurements))
            self.kernels = engine.get_stats()["kernels"]


def _measure(
    args: argparse.Namespace,
    workloads: list[Workload],
    baseline: Baseline,
    engine: EngineRuns,
    runner: asyncio.Runner,
) -> dict[str, Summary]:
    """Every workload's summary, by name. Engine and baseline never have threads at once, see `run_on_own_thread`."""
    warm_up = WARM_UP.fitted(baseline.max_length).draw(0, baseline.vocab_size)

    def run_both(workload: Workload, repeat: int, measurements: Measurements, step: Callable[[str], None]) -> None:
        """Engine and baseline on the same requests, in alternating order."""
        work = workload.draw(repeat, baseline.vocab_size)
        for side in ("engine", "transformers")[:: 1 if repeat % 2 == 0 else -1]:
            step(f"{workload.name}: {side}")
            if side == "engine":
                engine.measure(runner, warm_up, work, measurements)
            elif not args.skip_baseline:
                measurements.baseline_s.append(run_on_own_thread(_seconds, baseline, warm_up, work))

    with progress_bar(TASKS_PER_REPEAT * (1 + len(workloads) * args.repeats)) as step:
        run_both(WARM_UP.fitted(baseline.max_length), 0, Measurements(), step)
        summaries = {}
        for workload in workloads:
            measurements = Measurements()
            for repeat in range(args.repeats):
                run_both(workload, repeat, measurements, step)
            summaries[workload.name] = measurements.summary(workload.draw(0, baseline.vocab_size))
    return summaries


def _seconds(baseline: Baseline, warm_up: Work, work: Work) -> float:
    baseline.generate(warm_up)
    start_s = time.perf_counter()
    baseline.generate(work)
    return time.perf_counter() - start_s


def conditions(name: str, baseline: Baseline) -> JsonObject:
    """What the results depend on."""
    return {
        "model": name,
        "device": baseline.device,
        "dtype": baseline.dtype,
        "threads": baseline.threads,
        "cores": len(os.sched_getaffinity(0)),
        "penstock": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _report(summaries: Mapping[str, Summary], facts: JsonObject) -> None:
    what = f"{facts['model']}, {facts['dtype']} on {facts['device']}, {facts['kernels']}"
    title = f"{what}: median of {facts['repeats']} (spread)"
    print_table(result_table(summaries, title))
    for line in facts["notes"]:
        note(line)
    ratios = [summary["ratio"] for summary in summaries.values()]
    write(json.dumps(facts | {"workloads": summaries, "ratio": overall_ratio(ratios)}) + "\n")

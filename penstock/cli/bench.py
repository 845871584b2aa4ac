"""`penstock bench`: the engine against `transformers.generate`, in one run, on the same weights.

Owns the order of measurements: engine and baseline alternate within every repeat, so that a machine that slows down
slows both. Never reuses token ids. The table goes to stderr, one JSON line to stdout. Called by `command`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version

from rich.console import Console

from penstock import __version__
from penstock.cli.measurements import Measurements, Summary, measure_engine, overall_ratio, result_table
from penstock.cli.options import add_model_options, engine_settings, names_from, positive
from penstock.cli.session import (
    JsonObject,
    exit_on_interrupt,
    loaded_engine,
    new_runner,
    quiet_libraries,
    run_on_own_thread,
)
from penstock.cli.terminal import note, status_line, write
from penstock.cli.workloads import WARM_UP, WORKLOADS, Work, Workload, cache_tokens
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
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

A ratio above 1 means that the engine is faster. transformers runs a static
batch with left padding and sdpa attention. No two repeats have the same token ids.
"""
TASKS_PER_REPEAT = 2
TABLE_WIDTH = 140  # if stderr is not a terminal


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "bench",
        help="compare this engine with transformers.generate",
        description="Compare the engine with transformers.generate in one run, on the same weights.",
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
    group.add_argument("--repeats", type=positive, metavar="N", default=3, help="repeats for the median (default: 3)")
    group.add_argument("--skip-baseline", action="store_true", help="measure the engine only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code."""
    if args.shape and args.model:
        raise ConfigurationError("--shape and --model exclude each other: give one of them")
    chosen = [WORKLOADS[name] for name in names_from(args.workloads, tuple(WORKLOADS))]
    name = args.shape or args.model or str(MODEL_DIR)
    with exit_on_interrupt(), status_line(f"loading {name} ..."):
        baseline, load_s = run_on_own_thread(_load_baseline, args)
    config = EngineConfig()
    workloads, notes = fit(chosen, min(baseline.max_length, config.max_sequence_length or baseline.max_length))
    for line in notes:
        note(line)
    works = [workload.draw(0, baseline.vocab_size) for workload in workloads]
    tokens = config.kv_cache_tokens or cache_tokens(works, config.block_size)
    with new_runner() as runner:
        summaries = _measure(args, workloads, baseline, tokens, runner)
    _report(summaries, conditions(name, baseline) | {"repeats": args.repeats, "load_s": load_s, "notes": notes})
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


def _load_baseline(args: argparse.Namespace) -> tuple[Baseline, float]:
    quiet_libraries()
    start_s = time.perf_counter()
    config = EngineConfig(**engine_settings(args))
    module = random_module(args.shape, config) if args.shape else load_module(args.model or MODEL_DIR, config)
    return Baseline(module), round(time.perf_counter() - start_s, 2)


def _measure(
    args: argparse.Namespace,
    workloads: list[Workload],
    baseline: Baseline,
    kv_cache_tokens: int,
    runner: asyncio.Runner,
) -> dict[str, Summary]:
    """Every workload's summary, by name. Engine and baseline never have threads at once, see `run_on_own_thread`."""

    def run_engine(work: Work, measurements: Measurements) -> None:
        warm_up = WARM_UP.fitted(baseline.max_length).draw(0, baseline.vocab_size)
        with loaded_engine(baseline.module, skip_tokenizer_init=True, kv_cache_tokens=kv_cache_tokens) as engine:
            runner.run(measure_engine(engine, warm_up, Measurements()))
            runner.run(measure_engine(engine, work, measurements))

    def run_both(workload: Workload, repeat: int, measurements: Measurements, step: Callable[[str], None]) -> None:
        """Engine and baseline on the same requests, in alternating order."""
        work = workload.draw(repeat, baseline.vocab_size)
        for side in ("engine", "transformers")[:: 1 if repeat % 2 == 0 else -1]:
            step(f"{workload.name}: {side}")
            if side == "engine":
                run_engine(work, measurements)
            elif not args.skip_baseline:
                measurements.baseline_s.append(run_on_own_thread(_seconds, baseline, work))

    with _progress(TASKS_PER_REPEAT * (1 + len(workloads) * args.repeats)) as step:
        run_both(WARM_UP.fitted(baseline.max_length), 0, Measurements(), step)
        summaries = {}
        for workload in workloads:
            measurements = Measurements()
            for repeat in range(args.repeats):
                run_both(workload, repeat, measurements, step)
            summaries[workload.name] = measurements.summary(workload.draw(0, baseline.vocab_size))
    return summaries


def _seconds(baseline: Baseline, work: Work) -> float:
    start_s = time.perf_counter()
    baseline.generate(work)
    return time.perf_counter() - start_s


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar if stderr is a terminal; yields a function to call before each task."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, numbers = progress.add_task("", total=total), iter(range(total + 1))
        yield lambda text: progress.update(task, description=text, completed=next(numbers))


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
    title = f"{facts['model']}, {facts['dtype']} on {facts['device']}, median of {facts['repeats']}"
    Console(stderr=True, width=None if sys.stderr.isatty() else TABLE_WIDTH).print(result_table(summaries, title))
    ratios = [summary["ratio"] for summary in summaries.values() if summary["ratio"] is not None]
    sys.stderr.flush()
    write(json.dumps(facts | {"workloads": summaries, "ratio": overall_ratio(ratios)}) + "\n")

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from rich.console import Console

from penstock import __version__
from penstock.cli.measuring import Figures, measure_engine, overall_ratio, result_table
from penstock.cli.options import add_model_options, engine_settings, names_of, positive
from penstock.cli.session import alone, event_loop, leaving_at_once, loaded_engine, quiet_libraries
from penstock.cli.terminal import note, waiting_for, write
from penstock.cli.workloads import WARM_UP, WORKLOADS, Work, Workload, cache_tokens
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.errors import ConfigurationError
from penstock.models.baseline import SHAPES, Baseline, load_module, random_module

EXAMPLES = """workloads (requests x prompt tokens -> new tokens of each):
  single    1 x 16 -> 64       the latency of one stream
  prefill   1 x 512 -> 1       reading a prompt
  batch8    8 x 128 -> 64      a few streams
  batch32   32 x 128 -> 64     many streams
  ragged32  32 x 32..256 -> 12..96, every request of another length
  prefix32  32 x (512 shared + 32) -> 32

examples:
  penstock bench --model ./my-model --repeats 5
  penstock bench --shape qwen3-0.6b --workloads single,batch8 | jq .ratio

A ratio above 1 says that the engine is faster. transformers runs a static batch
with left padding and sdpa attention. Every repeat has token ids of its own.
"""
TASKS_PER_REPEAT = 2
WIDTH = 140  # of a table that goes into a file


def add_parser(commands: Any) -> None:
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
    work = parser.add_argument_group("measurement")
    work.add_argument("--workloads", metavar="W,W", default=",".join(WORKLOADS), help="which to run (default: all)")
    work.add_argument("--repeats", type=positive, metavar="N", default=3, help="medians are over these (default: 3)")
    work.add_argument("--skip-baseline", action="store_true", help="measure the engine only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises `PenstockError`; returns the exit code."""
    if args.shape and args.model:
        raise ConfigurationError("--shape and --model exclude each other: give one of them")
    chosen = [WORKLOADS[name] for name in names_of(args.workloads, tuple(WORKLOADS))]
    name = args.shape or args.model or str(MODEL_DIR)
    with leaving_at_once(), waiting_for(f"loading {name} ..."):
        baseline, loading_s = alone(_load_baseline, args)
    config = EngineConfig()
    limit = min(baseline.max_length, config.max_sequence_length or baseline.max_length)
    fitted, notes = fit(chosen, limit)
    for line in notes:
        note(line)
    works = [workload.draw(0, baseline.vocab_size) for workload in fitted]
    tokens = config.kv_cache_tokens or cache_tokens(works, config.block_size)
    with event_loop() as loop:
        summaries = _measure(args, fitted, baseline, tokens, loop)
    _report(args, summaries, facts(name, baseline) | {"repeats": args.repeats, "load_s": loading_s, "notes": notes})
    return 0


def fit(chosen: list[Workload], max_length: int) -> tuple[list[Workload], list[str]]:
    """The workloads within a model's length, and a note for each that had to shrink."""
    fitted = [workload.fitted(max_length) for workload in chosen]
    return fitted, [
        f"{after.name} is scaled down from {before.longest} to {after.longest} tokens per request: "
        f"the model's limit is {max_length}"
        for before, after in zip(chosen, fitted, strict=True)
        if before != after
    ]


def _load_baseline(args: argparse.Namespace) -> tuple[Baseline, float]:
    quiet_libraries()
    begin = time.perf_counter()
    config = EngineConfig(**engine_settings(args))
    module = random_module(args.shape, config) if args.shape else load_module(args.model or MODEL_DIR, config)
    return Baseline(module), round(time.perf_counter() - begin, 2)


def _measure(
    args: argparse.Namespace,
    workloads: list[Workload],
    baseline: Baseline,
    kv_cache_tokens: int,
    loop: asyncio.Runner,
) -> dict[str, Any]:
    """Every workload's summary, by name. Engine and baseline never exist on threads at the same time, see `alone`."""

    def with_engine(work: Work, figures: Figures) -> None:
        warm_up = WARM_UP.fitted(baseline.max_length).draw(0, baseline.vocab_size)
        with loaded_engine(baseline.module, skip_tokenizer_init=True, kv_cache_tokens=kv_cache_tokens) as engine:
            loop.run(measure_engine(engine, warm_up, Figures()))
            loop.run(measure_engine(engine, work, figures))

    def one(turn: Workload, repeat: int, figures: Figures, step: Callable[[str], None]) -> None:
        """Engine and baseline on the same requests; who begins changes from repeat to repeat."""
        work = turn.draw(repeat, baseline.vocab_size)
        for who in ("engine", "transformers")[:: 1 if repeat % 2 == 0 else -1]:
            step(f"{turn.name}: {who}")
            if who == "engine":
                with_engine(work, figures)
            elif not args.skip_baseline:
                figures.baseline_s.append(alone(_seconds, baseline, work))

    with _progress(TASKS_PER_REPEAT * (1 + len(workloads) * args.repeats)) as step:
        one(WARM_UP.fitted(baseline.max_length), 0, Figures(), step)
        found = {}
        for workload in workloads:
            figures = Figures()
            for repeat in range(args.repeats):
                one(workload, repeat, figures, step)
            found[workload.name] = figures.summary(workload.draw(0, baseline.vocab_size))
    return found


def _seconds(baseline: Baseline, work: Work) -> float:
    begin = time.perf_counter()
    baseline.generate(work)
    return time.perf_counter() - begin


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr where that is a terminal; call what it yields before each task."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, begun = progress.add_task("", total=total), iter(range(total + 1))
        yield lambda text: progress.update(task, description=text, completed=next(begun))


def facts(name: str, baseline: Baseline) -> dict[str, Any]:
    """What the figures depend on."""
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


def _report(args: argparse.Namespace, summaries: dict[str, Any], conditions: dict[str, Any]) -> None:
    title = f"{conditions['model']}, {conditions['dtype']} on {conditions['device']}, median of {args.repeats}"
    Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH).print(result_table(summaries, title))
    ratios = [summary["ratio"] for summary in summaries.values() if summary["ratio"] is not None]
    sys.stderr.flush()
    write(json.dumps(conditions | {"workloads": summaries, "ratio": overall_ratio(ratios)}) + "\n")

"""How fast is a live module under each optimization level of `PerformanceOptimizer`?

Each level in turn, over the same transformers module, compared with the module's own `generate`: one prompt, and a
batch of eight, with 64 prompt tokens and 64 new ones, greedy. Reported are tokens per second, the time to the first
token, and the memory beside the module: packed copies of weights, and K/V.

--report writes the table into a section of docs/performance.md, one for each model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from harness.console import Step, finish, note, progress, show
from harness.engines import vocabulary_of
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from harness.report import markdown_table
from harness.sections import replaced
from headline import Watched
from peers.workloads import Workload
from penstock import EngineConfig, OptimizationConfig, OptimizationLevel, PerformanceOptimizer
from penstock.models.baseline import load_module

EPILOG = """examples:
  python benchmarks/levels.py
  python benchmarks/levels.py --shape qwen3-0.6b --repeats 1 --report docs/performance.md
"""
ONE, MANY = Workload("one", 1, 0, 64, 64), Workload("many", 8, 0, 64, 64)
Figures = dict[str, float]
Prompts = list[list[int]]
MS, MIB = 1000.0, 2**20
COLUMNS = {
    "one_tok_s": "one prompt, tok/s",
    "many_tok_s": "8 prompts, tok/s",
    "first_token_ms": "first token, ms",
    "copies_mib": "weights copied, MiB",
    "cache_mib": "K/V at most, MiB",
}


def prompts(workload: Workload, repeat: int, source: str) -> Prompts:
    """Token ids of a repeat."""
    return [prompt for prompt, _ in workload.draw(repeat, vocabulary_of(source))]


def figures(single: list[tuple[float, float]], batch: list[float]) -> Figures:
    """Medians: `single` has (total seconds, seconds until the first token) per repeat, `batch` total seconds."""
    return {
        "one_tok_s": ONE.output / median(seconds for seconds, _ in single),
        "many_tok_s": MANY.requests * MANY.output / median(batch),
        "first_token_ms": MS * median(first_s for _, first_s in single),
    }


def by_level(module: Any, name: OptimizationLevel, source: str, repeats: int, settings: dict[str, Any]) -> Figures:
    """One level. The first generation, which touches the memory, is not measured."""
    optimizer = PerformanceOptimizer(module, OptimizationConfig(level=name), **{"log_level": "ERROR", **settings})
    options: dict[str, Any] = {"max_length": ONE.output, "temperature": 0.0, "ignore_eos": True}
    single, batch = [], []
    try:
        for repeat in range(repeats + 1):
            _, alone = optimizer.optimized_generate(prompts(ONE, repeat, source), **options)
            _, together = optimizer.optimized_generate(prompts(MANY, repeat, source), **options)
            if repeat:
                single.append((alone["generation_time"], alone["first_token_time"]))
                batch.append(together["generation_time"])
        stats = optimizer.engine.get_stats()
    finally:
        optimizer.stop()
    copies = stats["weight_bytes"] / MIB if stats["rewrites"] else 0.0
    cache_mib = (stats["config"]["memory_pool_size"] or 0) / MIB
    return {**figures(single, batch), "copies_mib": copies, "cache_mib": cache_mib}


def by_transformers(module: Any, source: str, repeats: int) -> Figures:
    """The module's own `generate`; several prompts as one batch."""
    watched, single, batch = Watched(module), [], []
    for repeat in range(repeats + 1):
        begin, first_s, end = watched.run([(prompt, ONE.output) for prompt in prompts(ONE, repeat, source)])
        many_begin, _, many_end = watched.run([(prompt, MANY.output) for prompt in prompts(MANY, repeat, source)])
        if repeat:
            single.append((end - begin, first_s - begin))
            batch.append(many_end - many_begin)
    watched.close()
    return figures(single, batch)


def measure(source: str, settings: dict[str, Any], repeats: int, step: Step) -> dict[str, Figures]:
    """The results of every level, and of transformers."""
    module = load_module(source, EngineConfig(**{name: settings[name] for name in ("dtype",) if name in settings}))
    step("transformers")
    results = {"transformers": by_transformers(module, source, repeats)}
    for name in OptimizationLevel:
        step(f"level {name}")
        results[name.value] = by_level(module, name, source, repeats, settings)
    return results


def rows(results: Mapping[str, Mapping[str, float]]) -> list[list[object]]:
    """The table."""
    return [[name, *(figures.get(column) for column in COLUMNS)] for name, figures in results.items()]


def document(model: str, results: Mapping[str, Mapping[str, float]], command: str) -> str:
    """The section of the report."""
    return (
        f"## Optimization levels, on {model}\n\n"
        f"`PerformanceOptimizer` over a live module, greedy, {ONE.unique} prompt tokens and {ONE.output} new ones; "
        "`transformers`\nruns the same module. K/V memory is allocated as it is used, up to the size in the table.\n\n"
        f"{markdown_table(('level', *COLUMNS.values()), rows(results))}\n"
        f"```\n{command}\n```\n"
    )


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="medians are over these (default: 3)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a section of docs/performance.md")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    name = name_of(args)
    with progress(1 + len(OptimizationLevel)) as step:
        results = measure(source_of(args), settings_of(args), args.repeats, step)
    show(f"{name}, medians of {args.repeats}", ("level", *COLUMNS.values()), rows(results))
    if args.report:
        model = f" --shape {args.shape}" if args.shape else ""
        section = document(name, results, f"python benchmarks/levels.py{model} --repeats {args.repeats}")
        text = args.report.read_text(encoding="utf-8") if args.report.exists() else ""
        args.report.write_text(replaced(text, f"levels {name}", section), encoding="utf-8")
        note(f"report: {args.report}")
    finish({"model": name, "repeats": args.repeats, "levels": results})


if __name__ == "__main__":
    main()

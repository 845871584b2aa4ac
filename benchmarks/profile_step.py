"""Where does each millisecond of a step go?

One step is built by hand and repeated on the loaded model: N sequences that each decode one token at a context of C
tokens, or one prompt of N tokens. Reported are the phases that the executor measures (forward pass, sampling) and the
remainder, and on request the Python functions (--functions) and PyTorch operations (--operations) that took the most
time. Both of these slow the step down: read them as proportions. Native kernels unknown to PyTorch count for the Python
function that calls them.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from array import array
from collections.abc import Callable
from statistics import median
from typing import Any

from harness.console import finish, note, show
from harness.engines import vocabulary_of
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from harness.stats import percentile
from penstock import EngineConfig, SamplingParams
from penstock.cli.session import quiet_libraries, run_on_own_thread
from penstock.step import Row, StepPlan

EPILOG = """examples:
  python benchmarks/profile_step.py --decode 1 --context 512
  python benchmarks/profile_step.py --shape qwen3-0.6b --decode 32 --context 256 --functions 15
  python benchmarks/profile_step.py --shape qwen3-0.6b --prefill 512 --operations 12
"""


def tokens_of(number: int, count: int, vocab_size: int) -> list[int]:
    """Arbitrary tokens, different for every sequence."""
    return [3 + (7 * number + place) % (min(vocab_size, 7000) - 3) for place in range(count)]


def row(number: int, start: int, end: int, block_size: int, vocab_size: int) -> Row:
    """A sequence of `end` tokens with its own blocks, of which those from `start` on are computed."""
    blocks = -(-end // block_size)
    return Row(
        seq_id=number,
        tokens=tokens_of(number, end, vocab_size),
        start=start,
        end=end,
        blocks=array("q", range(number * blocks, (number + 1) * blocks)),
        samples=True,
        params=SamplingParams(temperature=0.0, max_tokens=1),
        prompt_len=end - 1 if start else end,
    )


def make_plan(args: argparse.Namespace, block_size: int, vocab_size: int) -> StepPlan:
    """The step of the options."""
    if args.prefill:
        return StepPlan((row(0, 0, args.prefill, block_size, vocab_size),))
    context = args.context
    return StepPlan(tuple(row(i, context - 1, context, block_size, vocab_size) for i in range(args.decode)))


def load(source: str, config: EngineConfig, plan: StepPlan) -> Any:
    """The model, with a cache for the step."""
    from penstock.models import loading

    quiet_libraries()
    runner = loading.load(source, None, config).runner
    runner.allocate(sum(len(row.blocks) for row in plan.rows), config.block_size)
    return runner


def phases(runner: Any, plan: StepPlan, steps: int) -> dict[str, list[float]]:
    """Seconds of every phase of every step, and of the remainder, after an unmeasured step."""
    results: dict[str, list[float]] = {}
    runner.execute(plan)
    for _ in range(steps):
        begin = time.perf_counter()
        result = runner.execute(plan)
        total_s = time.perf_counter() - begin
        parts = {**result.timings_s, "rest": total_s - sum(result.timings_s.values()), "whole step": total_s}
        for name, seconds in parts.items():
            results.setdefault(name, []).append(seconds)
    return results


def functions(run: Callable[[], None], steps: int, count: int) -> list[list[Any]]:
    """(function, ms per step in it alone, ms per step with what it calls, calls per step), most expensive first."""
    profile = cProfile.Profile()
    profile.runcall(run)
    stats: Any = pstats.Stats(profile)
    rows = [
        [f"{'/'.join(file.split('/')[-2:])}:{line} {name}", 1000 * alone_s / steps, 1000 * all_s / steps, calls / steps]
        for (file, line, name), (_, calls, alone_s, all_s, _) in stats.stats.items()
    ]
    return sorted(rows, key=lambda row: -row[1])[:count]


def operations(run: Callable[[], None], steps: int, count: int) -> list[list[Any]]:
    """(operation, ms per step in it alone, ms per step with what it calls, calls per step), most expensive first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    rows = [
        [event.key, event.self_cpu_time_total / 1000 / steps, event.cpu_time_total / 1000 / steps, event.count / steps]
        for event in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row[1])[:count]


def measure(source: str, config: EngineConfig, args: argparse.Namespace, plan: StepPlan) -> dict[str, Any]:
    """All measurements, on the thread that also loaded the model, as in the engine."""
    runner = load(source, config, plan)

    def run() -> None:
        for _ in range(args.steps):
            runner.execute(plan)

    return {
        "phases_ms": {name: summary(seconds) for name, seconds in phases(runner, plan, args.steps).items()},
        "functions": functions(run, args.steps, args.functions) if args.functions else [],
        "operations": operations(run, args.steps, args.operations) if args.operations else [],
    }


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and p90 in milliseconds."""
    return {"p50": round(1000 * median(seconds), 4), "p90": round(1000 * percentile(seconds, 90), 4)}


def main() -> None:
    """Measure, and print the tables and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    step = parser.add_argument_group("step")
    kind = step.add_mutually_exclusive_group()
    kind.add_argument("--decode", type=int, default=1, metavar="N", help="sequences with one token each (default: 1)")
    kind.add_argument("--prefill", type=int, metavar="N", help="one prompt of N tokens instead")
    step.add_argument("--context", type=int, default=256, metavar="C", help="tokens of a decoding sequence (256)")
    step.add_argument("--steps", type=int, default=20, metavar="N", help="number of repetitions (default: 20)")
    step.add_argument("--functions", type=int, default=0, metavar="N", help="show N Python functions")
    step.add_argument("--operations", type=int, default=0, metavar="N", help="show N PyTorch operations")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    source, settings = source_of(args), settings_of(args)
    longest = max(2048, args.prefill or args.context)
    config = EngineConfig(**{"max_sequence_length": longest, "skip_tokenizer_init": True, **settings})
    plan = make_plan(args, config.block_size, vocabulary_of(source))
    results = run_on_own_thread(measure, source, config, args, plan)
    description = f"prefill of {args.prefill}" if args.prefill else f"{args.decode} decoding at context {args.context}"
    rows = [[name, *ms.values()] for name, ms in results["phases_ms"].items()]
    show(f"{name_of(args)}: {description}, ms per step", ("phase", "p50", "p90"), rows)
    for name in ("functions", "operations"):
        if results[name]:
            show(f"{name}, while profiled", (name[:-1], "ms alone", "ms with calls", "calls"), results[name])
    step_ms = results["phases_ms"]["whole step"]["p50"]
    note(f"{1000 * plan.num_tokens / step_ms:,.0f} tokens/s without the time between steps")
    finish({"model": name_of(args), "step": description, "settings": settings, **results})


if __name__ == "__main__":
    main()

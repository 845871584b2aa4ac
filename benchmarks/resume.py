"""What does it take to resume a sequence that was preempted: reading its K/V back, or computing them again?

The cache has room for one sequence. One of N tokens decodes until an urgent one, as long, takes its place; that one
ends with its first token, and the first one resumes. Timed are the urgent one's first token, since moving the other's
blocks out is part of it, and the time from there to the next token of the one that was preempted. Both ways give the
same tokens, which is checked.

Told besides are the figures by which the engine chooses between the two: seconds to move a token's K/V, and seconds to
compute it.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from harness.console import finish, note, show
from harness.engines import vocabulary_of
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from penstock import EngineConfig, RequestPriority, SamplingParams
from penstock.cache.manager import CacheManager
from penstock.cli.session import quiet_libraries, run_on_own_thread
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence
from penstock.step import Event

EPILOG = """examples:
  python benchmarks/resume.py
  python benchmarks/resume.py --shape qwen3-0.6b --tokens 1000 --repeats 5
  python benchmarks/resume.py --shape qwen3-0.6b --set kv_cache_dtype=int8
"""
WAYS = {"compute again": 0, "read back": 4}  # times the cache that the tier holds
DECODED = 4


@dataclass(slots=True)
class Turn:
    """Seconds of one preemption, and what its resumption put through the model and moved."""

    urgent_s: float = 0.0
    resume_s: float = 0.0
    computed: int = 0
    moved: int = 0
    swap_s: float = 0.0
    prefill_s: float = 0.0  # of the urgent one's forward passes


class Bench:
    """Scheduler, cache and model on this thread, with room for one sequence of `length` tokens."""

    def __init__(self, runner: Any, config: EngineConfig, length: int, tier: int) -> None:
        blocks = -(-(length + 2 * DECODED) // config.block_size)
        runner.allocate(blocks, config.block_size, tier * blocks)
        self.runner = runner
        self.cache = CacheManager(blocks, config.block_size, num_host_blocks=tier * blocks)
        self.scheduler = Scheduler(config, self.cache)
        self.outputs: list[list[int]] = []
        self.turn = Turn()

    def preempt(self, number: int, length: int, vocab_size: int) -> Turn:
        """One sequence is preempted by another and resumes."""
        self.turn, rng = Turn(), random.Random(number)
        first, urgent = ([rng.randrange(3, min(vocab_size, 7000)) for _ in range(count)] for count in (length, length))
        old = self.add(2 * number, first, 2 * DECODED, RequestPriority.LOW)
        while old.num_generated < DECODED:
            self.step()
        new = self.add(2 * number + 1, urgent, 1, RequestPriority.CRITICAL)
        begin, steps = time.perf_counter(), self.until(new)
        self.turn.prefill_s = sum(timings["forward"] for timings in steps)
        between = time.perf_counter()
        self.turn.computed = self.turn.moved = 0
        self.turn.swap_s = 0.0
        self.until(old)
        self.turn.urgent_s, self.turn.resume_s = between - begin, time.perf_counter() - between
        while self.scheduler.has_work:
            self.step()
        self.outputs.append(old.tokens[old.prompt_len :])
        return self.turn

    def add(self, number: int, tokens: list[int], new: int, priority: RequestPriority) -> Sequence:
        """Queue a sequence."""
        params = SamplingParams(temperature=0.0, max_tokens=new)
        fields = {"params": params, "max_len": len(tokens) + new, "priority": priority}
        seq = Sequence(id=number, request_id=str(number), tokens=tokens, **fields)
        self.scheduler.add(seq, 0.0)
        return seq

    def until(self, seq: Sequence) -> list[dict[str, float]]:
        """Step until a sequence has one more token; the timings of the steps."""
        steps, length = [], seq.length
        while seq.length == length:
            steps.append(self.step())
        return steps

    def step(self) -> dict[str, float]:
        """Plan, execute, commit."""
        plan = self.scheduler.plan(0.0)
        result = self.runner.execute(plan)
        events: list[Event] = self.scheduler.commit(plan, result)
        assert not any(event.error for event in events)
        self.turn.computed += plan.num_tokens
        self.turn.moved += len(plan.swaps_out) + len(plan.swaps_in)
        self.turn.swap_s += result.timings_s.get("swap", 0.0)
        return result.timings_s


def measure(source: str, config: EngineConfig, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways, `repeats` times after one time that is not counted, on the thread that also loaded the model."""
    from penstock.models import loading

    quiet_libraries()
    runner = loading.load(source, None, config).runner
    found: dict[str, Any] = {"bytes_per_token": runner.spec.kv_bytes_per_token}
    outputs = []
    for way, tier in WAYS.items():
        bench = Bench(runner, config, args.tokens, tier)
        turns = [bench.preempt(number, args.tokens, vocab_size) for number in range(args.repeats + 1)][1:]
        found[way] = summary(turns, args.tokens, config.block_size)
        outputs.append(bench.outputs)
    assert outputs[0] == outputs[1], "the two ways give different tokens"
    return found


def summary(turns: list[Turn], length: int, block_size: int) -> dict[str, float]:
    """Medians of times in ms; the rest as in every turn."""
    moved = turns[-1].moved
    return {
        "resume_ms": round(1000 * median(turn.resume_s for turn in turns), 3),
        "urgent_ms": round(1000 * median(turn.urgent_s for turn in turns), 3),
        "computed_tokens": turns[-1].computed,
        "moved_blocks": moved,
        "move_us_per_token": round(1e6 * median(turn.swap_s for turn in turns) / (moved * block_size), 3)
        if moved
        else 0,
        "compute_us_per_token": round(1e6 * median(turn.prefill_s for turn in turns) / length, 3),
    }


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--tokens", type=int, metavar="N", default=1000, help="of each sequence (default: 1000)")
    parser.add_argument("--repeats", type=int, metavar="N", default=5, help="medians are over these (default: 5)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    source, settings = source_of(args), settings_of(args)
    config = EngineConfig(**{"max_sequence_length": args.tokens + 64, "skip_tokenizer_init": True, **settings})
    found = run_on_own_thread(measure, source, config, vocabulary_of(source), args)
    rows = [[way, *found[way].values()] for way in WAYS]
    columns = ("", "resume ms", "urgent ms", "tokens computed", "blocks moved", "move us/token", "compute us/token")
    show(f"{name_of(args)}, {args.tokens} tokens", columns, rows)
    again, back = (found[way] for way in WAYS)
    speed = found["bytes_per_token"] / back["move_us_per_token"] / 1000
    times = again["resume_ms"] / back["resume_ms"]
    note(f"reading back resumes {times:.1f} times as fast; blocks are copied at {speed:.1f} GB/s")
    finish({"model": name_of(args), "tokens": args.tokens, "settings": settings, **found})


if __name__ == "__main__":
    main()

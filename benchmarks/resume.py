"""How long does it take to resume a preempted sequence, by reading its K/V back or by computing them again?

The cache has room for one sequence. A sequence of N tokens decodes until an urgent one of the same length preempts it;
the urgent one ends with its first token, and the other resumes. Two times are measured: the first token of the urgent
sequence, which includes moving the blocks of the other to the host, and from there the next token of the preempted one.
Both ways give the same tokens, which is checked.

Also reported are the measurements by which the engine chooses between the two ways: the seconds to move a token's K/V,
and the seconds to compute it.
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
    """Seconds of one preemption, and the tokens computed and blocks moved to resume."""

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
        prompt, urgent_prompt = ([rng.randrange(3, min(vocab_size, 7000)) for _ in range(length)] for _ in range(2))
        preempted = self.add(2 * number, prompt, 2 * DECODED, RequestPriority.LOW)
        while preempted.num_generated < DECODED:
            self.step()
        urgent = self.add(2 * number + 1, urgent_prompt, 1, RequestPriority.CRITICAL)
        start_s, steps = time.perf_counter(), self.until(urgent)
        self.turn.prefill_s = sum(timings["forward"] for timings in steps)
        urgent_done_s = time.perf_counter()
        self.turn.computed = self.turn.moved = 0
        self.turn.swap_s = 0.0
        self.until(preempted)
        self.turn.urgent_s, self.turn.resume_s = urgent_done_s - start_s, time.perf_counter() - urgent_done_s
        while self.scheduler.has_work:
            self.step()
        self.outputs.append(preempted.tokens[preempted.prompt_len :])
        return self.turn

    def add(self, number: int, tokens: list[int], urgent: int, priority: RequestPriority) -> Sequence:
        """Queue a sequence."""
        params = SamplingParams(temperature=0.0, max_tokens=urgent)
        fields = {"params": params, "max_len": len(tokens) + urgent, "priority": priority}
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
    """Both ways, `repeats` times after an unmeasured first time, on the thread that also loaded the model."""
    from penstock.models import loading

    quiet_libraries()
    runner = loading.load(source, None, config).runner
    results: dict[str, Any] = {"bytes_per_token": runner.spec.kv_bytes_per_token}
    outputs = []
    for way, tier in WAYS.items():
        bench = Bench(runner, config, args.tokens, tier)
        turns = [bench.preempt(number, args.tokens, vocab_size) for number in range(args.repeats + 1)][1:]
        results[way] = summary(turns, args.tokens, config.block_size)
        outputs.append(bench.outputs)
    assert outputs[0] == outputs[1], "the two ways give different tokens"
    return results


def summary(turns: list[Turn], length: int, block_size: int) -> dict[str, float]:
    """Medians of times in ms; the counts are the same in every repetition."""
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
    results = run_on_own_thread(measure, source, config, vocabulary_of(source), args)
    rows = [[way, *results[way].values()] for way in WAYS]
    columns = ("", "resume ms", "urgent ms", "tokens computed", "blocks moved", "move us/token", "compute us/token")
    show(f"{name_of(args)}, {args.tokens} tokens", columns, rows)
    recomputed, read_back = (results[way] for way in WAYS)
    speed = results["bytes_per_token"] / read_back["move_us_per_token"] / 1000
    speedup = recomputed["resume_ms"] / read_back["resume_ms"]
    note(f"reading back resumes {speedup:.1f} times as fast; blocks are copied at {speed:.1f} GB/s")
    finish({"model": name_of(args), "tokens": args.tokens, "settings": settings, **results})


if __name__ == "__main__":
    main()

"""How many tokens per second does the engine generate?

Six workloads on one model, all requests of a workload concurrently, every delta read as it arrives. Token ids are
random, sampling is greedy, EOS does not stop a request, and no two repeats have the same ids, so that no cache of an
earlier one helps. Each repeat runs all workloads, so that a machine that slows down slows each of them; medians are
reported.

For a comparison with transformers see `penstock bench`, with other engines `compare.py`.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from harness.console import Step, finish, progress, show
from harness.engines import engine_for, vocabulary_of
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from peers.workloads import WARM_UP, WORKLOADS, Workload, limits, parse
from penstock import InferenceEngine
from penstock.cli.measurements import Measurements, measure_engine

EPILOG = """workloads (requests x prompt tokens -> new tokens of each):
  single    1 x 16 -> 64       the latency of one stream
  prefill   1 x 512 -> 1       reading a prompt
  batch8    8 x 128 -> 64      a few streams
  batch32   32 x 128 -> 64     many streams
  ragged32  32 x 32..256 -> 12..96, every request of another length
  prefix32  32 x (512 shared + 32) -> 32
  8x128+64  any other size, written like this

examples:
  python benchmarks/throughput.py --shape qwen3-0.6b
  python benchmarks/throughput.py --shape qwen3-0.6b --quantization int8 --workloads single,batch32
  python benchmarks/throughput.py --model ./my-model --set max_num_batched_tokens=1024 | tail -1 | jq .workloads
"""


async def measure(
    engine: InferenceEngine, workloads: list[Workload], repeats: int, vocab_size: int, step: Step
) -> dict[str, dict[str, Any]]:
    """Every workload's summary, by name."""
    figures = {workload.name: Measurements() for workload in workloads}
    async with engine:
        await measure_engine(engine, WARM_UP.draw(0, vocab_size), Measurements())
        for repeat in range(repeats):
            for workload in workloads:
                step(f"{workload.name}, repeat {repeat + 1}")
                await measure_engine(engine, workload.draw(repeat, vocab_size), figures[workload.name])
    return {workload.name: figures[workload.name].summary(workload.draw(0, vocab_size)) for workload in workloads}


def table_row(name: str, results: dict[str, Any]) -> list[object]:
    """One row of the table: the rate of new tokens, or of all tokens if every request has only one new token."""
    engine = results["engine"]
    rate = "total_tok_s" if results["output_tokens"] == results["requests"] else "output_tok_s"
    times = [engine[kind] or {} for kind in ("first_token_s", "inter_token_s")]
    return [name, engine[rate], *(1000 * kind[q] if q in kind else None for kind in times for q in ("p50", "p99"))]


def main() -> None:
    """Measure, and print a table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--workloads", type=parse, metavar="W,W", default=list(WORKLOADS.values()), help="default: all")
    parser.add_argument("--repeats", type=int, metavar="N", default=3, help="medians are over these (default: 3)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    source, settings = source_of(args), settings_of(args)
    engine = engine_for(source, settings, limits(args.workloads))
    with progress(args.repeats * len(args.workloads)) as step:
        results = asyncio.run(measure(engine, args.workloads, args.repeats, vocabulary_of(source), step))
    columns = ("workload", "tok/s", "first token p50 ms", "p99 ms", "per token p50 ms", "p99 ms")
    show(f"{name_of(args)}, median of {args.repeats}", columns, [table_row(*item) for item in results.items()])
    finish({"model": name_of(args), "settings": settings, "repeats": args.repeats, "workloads": results})


if __name__ == "__main__":
    main()

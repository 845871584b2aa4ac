"""This engine, in its own environment: pip install -e .

Measures it as an embedding program uses it: `InferenceEngine` on the model folder, all requests awaited concurrently.
"""

from __future__ import annotations

import asyncio
from typing import Any

from workloads import Limits, Run, Work, arguments, measure


def main() -> None:
    """Measure."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="auto", help="auto (the folder's), bfloat16 or float32")
    parser.add_argument("--quantization", help="int8, or nothing")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of EngineConfig")
    args = parser.parse_args()
    overrides = dict(item.split("=", 1) for item in args.set)
    if args.quantization:
        overrides["quantization"] = args.quantization
    measure(lambda limits: load(args.model, args.dtype, overrides, limits), args)


def load(model: str, dtype: str, overrides: dict[str, Any], limits: Limits) -> Run:
    """A started engine with room for the workloads."""
    from penstock import InferenceEngine, SamplingParams

    room = {
        "max_batch_size": max(32, limits.requests),
        "max_sequence_length": max(2048, limits.longest),
        "kv_cache_tokens": limits.tokens,
    }
    settings = {**room, "dtype": dtype, "skip_tokenizer_init": True, "log_level": "ERROR", **overrides}
    engine = InferenceEngine(model, **settings)
    engine.start()
    loop = asyncio.Runner()

    async def run_all(work: Work) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in work]
        handles = [engine.generate(ids, request_params) for (ids, _), request_params in zip(work, params, strict=True)]
        return [(await handle).outputs[0].token_ids for handle in handles]

    return lambda work: loop.run(run_all(work))


if __name__ == "__main__":
    main()

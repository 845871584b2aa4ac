"""How long does it take until packed weights have followed an update, compared with packing them the first time?

A live module of random weights is borrowed with packed weights. Reported are the seconds of its first packing, those of
writing all packed copies again (best of several), of one layer and of one matrix, and the memory that takes beyond what
was there before. Copies of float32 master weights are measured by `--master float32`.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.console import finish, note, show
from harness.options import parser_for
from penstock.config import EngineConfig
from penstock.kernels.products import Linear
from penstock.models.baseline import SHAPES, random_module
from penstock.models.loading import load

EPILOG = """examples:
  python benchmarks/weight_updates.py
  python benchmarks/weight_updates.py --shape llama-160m --copies int8
  python benchmarks/weight_updates.py --master float32 --repeats 5
"""
COPIES: dict[str, dict[str, Any]] = {
    "as the module": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}
MIB = 2**20


@contextlib.contextmanager
def packing_time() -> Iterator[list[float]]:
    """The seconds of each call that packs, while the block runs."""
    seconds: list[float] = []
    write = Linear.write

    def timed(*args: Any) -> None:
        begin = time.perf_counter()
        write(*args)
        seconds.append(time.perf_counter() - begin)

    Linear.write = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Linear.write = write  # type: ignore[method-assign]


def best(call: Callable[[], object], repeats: int) -> float:
    """The shortest time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def resident(field: str) -> int:
    """Bytes of memory that this process has (VmRSS) or had at most (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def extra_bytes(call: Callable[[], object]) -> int | None:
    """How much the memory of this process grows for a moment; None where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        call()
        return max(0, resident("VmHWM") - before)
    except OSError:
        return None


def measure(module: Any, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Load, then refresh."""
    config = EngineConfig(skip_tokenizer_init=True, verify_model=False, weight_mode="packed", **settings)
    with packing_time() as seconds:
        runner = load(module, None, config).runner
        # Copies in another dtype are packed a second time at load, from the weights themselves.
        first_s = sum(seconds) / (2 if runner.spec.dtype != str(module.dtype).removeprefix("torch.") else 1)
    names = [name for name, _ in module.named_parameters()]
    layer = [name for name in names if ".layers.1." in name]
    refresh = runner.refresh_weights
    result = {
        "first_packing_s": first_s,
        "all_s": best(refresh, repeats),
        "layer_s": best(lambda: refresh(layer), repeats),
        "matrix_s": best(lambda: refresh([next(name for name in layer if "down_proj" in name)]), repeats),
        "packed_bytes": runner.spec.packed_bytes,
        "extra_bytes": extra_bytes(refresh),
    }
    runner.close()
    return {**result, "ratio": result["all_s"] / first_s}


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-0.6b", help="sizes (default: qwen3-0.6b)")
    parser.add_argument("--master", metavar="T", default="bfloat16", help="dtype of the module (default: bfloat16)")
    parser.add_argument("--copies", choices=COPIES, action="append", help="what to pack, repeatable (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="of each refresh, the best counts (default: 3)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    module = random_module(args.shape, EngineConfig(dtype=args.master))
    results: dict[str, dict[str, Any]] = {}
    for name in args.copies or COPIES:
        note(name)
        results[name] = measure(module, COPIES[name], args.repeats)
    columns = ("", "first packing s", "all again s", "one layer s", "one matrix s", "packed MiB", "extra MiB", "ratio")
    rows = [
        [name, *(r[key] for key in ("first_packing_s", "all_s", "layer_s", "matrix_s")), r["packed_bytes"] / MIB,
         None if r["extra_bytes"] is None else r["extra_bytes"] / MIB, r["ratio"]]
        for name, r in results.items()
    ]  # fmt: skip
    show(f"{args.shape}, weights in {args.master}", columns, rows)
    finish({"shape": args.shape, "master": args.master, "results": results})


if __name__ == "__main__":
    main()

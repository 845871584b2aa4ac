"""Facts and limits of this machine: `python -m harness.roofline` prints one JSON line.

Measures bytes read per second and operations per second of matrix products in bfloat16 and int8, briefly, with PyTorch
on all cores; the best of several kernels and sizes is the limit. Run in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

READ_BYTES = 512 * 1024**2  # larger than any cache
SIZES = ((512, 1024, 3072), (512, 3072, 1024), (768, 768, 768), (2048, 2048, 2048))
REPEATS, MIN_SECONDS = 3, 0.2
FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
LIBRARIES = ("penstock", "torch", "transformers")


def cpu_facts(cpuinfo: str) -> dict[str, Any]:
    """Model name and relevant features, from the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    fields: dict[str, str] = {}
    for name, _, value in lines:
        fields.setdefault(name.strip().lower(), value.strip())
    flags = (fields.get("flags") or fields.get("features") or "").split()
    name = fields.get("model name") or fields.get("cpu part") or platform.processor() or platform.machine()
    return {"cpu": name, "features": [feature for feature in FEATURES if feature in flags]}


def machine() -> dict[str, Any]:
    """Facts that the results depend on."""
    path = Path("/proc/cpuinfo")
    facts = cpu_facts(path.read_text(encoding="utf-8") if path.exists() else "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return facts | {"cores": cores, "ram_bytes": ram, "system": platform.platform(), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of Python and the relevant libraries."""
    numbers = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            from penstock import __version__

            numbers[name] = __version__ if name == "penstock" else "none"
    return numbers


def best_rate(action: Callable[[], object], amount: float) -> float:
    """The best amount per second of several short runs, after one unmeasured call."""
    action()
    best = 0.0
    for _ in range(REPEATS):
        count, begin = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - begin < MIN_SECONDS:
            action()
            count += 1
        best = max(best, amount * count / (time.perf_counter() - begin))
    return best


def read_bandwidth() -> float:
    """Bytes per second: a sum, or a product of a matrix and a vector, over more memory than any cache holds."""
    import torch

    values = torch.ones(READ_BYTES // 4)
    matrix, vector = values.view(-1, 4096), torch.ones(4096)
    return max(best_rate(values.sum, READ_BYTES), best_rate(lambda: matrix @ vector, READ_BYTES))


def bf16_rate() -> float:
    """Operations per second of x @ w.T in bfloat16; a multiply-add counts as two."""
    import torch

    rates = []
    for m, k, n in SIZES:
        x, w = torch.ones(m, k, dtype=torch.bfloat16), torch.ones(n, k, dtype=torch.bfloat16)
        rates.append(best_rate(lambda x=x, w=w: torch.nn.functional.linear(x, w), 2.0 * m * k * n))  # type: ignore[misc]
    return max(rates)


def int8_rate() -> float | None:
    """Operations per second of int8 products summed in int32; None if this PyTorch has none."""
    import torch

    rates = []
    for m, k, n in SIZES:
        x, w = torch.ones(m, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8).t()
        try:
            rates.append(best_rate(lambda x=x, w=w: torch._int_mm(x, w), 2.0 * m * k * n))  # type: ignore[misc]
        except (RuntimeError, AttributeError):
            return None
    return max(rates)


def measure() -> dict[str, Any]:
    """Facts and limits."""
    import torch

    with torch.inference_mode():
        limits = {"read_bytes_s": read_bandwidth(), "bf16_ops_s": bf16_rate(), "int8_ops_s": int8_rate()}
    return {"kind": "machine", **machine(), "threads": torch.get_num_threads(), **limits}


if __name__ == "__main__":
    print(json.dumps(measure()))

"""What only PyTorch knows about this machine: devices, threads, and how fast memory and matrices really are.

Measures for a given time, allocates at most a quarter of a gigabyte, changes no setting. Called by `penstock doctor`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from penstock.models.memory import free_bytes

COPY_BYTES = 96 * 1024**2
MATRIX_SIZE = {"cpu": 768, "cuda": 4096}


def hardware() -> dict[str, Any]:
    """Threads that PyTorch uses, the best CPU instructions it knows here, free host memory, CUDA devices."""
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "ram_free_bytes": free_bytes(torch.device("cpu")),
        "cuda_build": torch.version.cuda,
        "cuda_devices": [_cuda_device(i) for i in range(torch.cuda.device_count())],
    }


def _cuda_device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(index)[0],
    }


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes read and written per second by copying a tensor larger than any cache."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES * _per_second(lambda: target.copy_(source), device, seconds)


def matmul_rate(device: str, dtype: str, seconds: float) -> float:
    """Floating-point operations per second of a square matrix product, a multiply-add being two."""
    size = MATRIX_SIZE.get(torch.device(device).type, 1024)
    left = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    right = torch.ones_like(left)
    with torch.inference_mode():
        return 2 * size**3 * _per_second(lambda: left @ right, device, seconds)


def _per_second(action: Callable[[], object], device: str, seconds: float) -> float:
    """How often per second `action` runs, over about `seconds`, after one unmeasured time."""
    action()
    _settle(device)
    count, begin = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begin < seconds:
        action()
        _settle(device)
        count += 1
    return count / (time.perf_counter() - begin)


def _settle(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

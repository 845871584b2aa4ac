"""What this machine computes with: devices, threads, and how fast memory and matrices really are.

The measurements are for `penstock doctor`: they run for a given time and allocate at most a quarter of a gigabyte. The
threads are set at load, on the model's own thread; that number is the one setting of PyTorch that is changed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

import torch

from penstock.models.memory import host_free_bytes

COPY_BYTES = 96 * 1024**2
MATRIX_SIZE = {"cpu": 768, "cuda": 4096}


class CudaDevice(TypedDict):
    """A CUDA device; sizes are bytes."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int


class Hardware(TypedDict):
    """Threads that PyTorch uses, the best CPU instructions it knows here, free host memory, CUDA devices."""

    threads: int
    cpu_capability: str
    ram_free_bytes: int
    cuda_build: str | None
    cuda_devices: list[CudaDevice]


def hardware() -> Hardware:
    """What PyTorch sees of this machine."""
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "ram_free_bytes": host_free_bytes(),
        "cuda_build": torch.version.cuda,
        "cuda_devices": [_cuda_device(i) for i in range(torch.cuda.device_count())],
    }


def _cuda_device(index: int) -> CudaDevice:
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
    """How often per second `action` runs, over about `seconds`, after one run that is not measured."""
    action()
    _synchronize(device)
    count, begin = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begin < seconds:
        action()
        _synchronize(device)
        count += 1
    return count / (time.perf_counter() - begin)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def kernel_threads(num_threads: int | None) -> int:
    """`num_threads`, or as many as PyTorch would use (one per core), within the CPU time of the container."""
    return num_threads or max(1, min(torch.get_num_threads(), usable_cores()))


def usable_cores() -> int:
    """Cores this process may run on, and no more than its control group may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def use_one_torch_thread() -> None:
    """Let PyTorch compute on the calling thread alone: the kernels have threads of their own.

    Two thread pools that wait for each other's cores are several times slower than one. The setting belongs to a
    thread, but changing it also changes what later threads start with; a thread that sets the old number restores that.
    """
    num_threads = torch.get_num_threads()
    if num_threads > 1:
        torch.set_num_threads(1)
        restoring = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
        restoring.start()
        restoring.join()


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Leave the calling thread with as many of PyTorch's threads as it had before."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)

"""How many threads compute: one for each core that this process may really use.

Owns the counting and the one setting of PyTorch that is touched. Called at load, on the model's own thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch


def kernel_threads(wanted: int | None) -> int:
    """`wanted`, or as many as PyTorch would use (a core each), within the CPU time that a container is given."""
    return wanted or max(1, min(torch.get_num_threads(), _usable_cores()))


def _usable_cores() -> int:
    """Cores this process may run on, and no more than its control group may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def one_torch_thread() -> None:
    """Let PyTorch compute on the calling thread alone: the kernels have threads of their own.

    Two teams that wait for each other's cores are slower than one by multiples. The setting belongs to a thread, but
    setting it also changes what later threads begin with; a thread that sets the old number puts that back.
    """
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(before,))
        other.start()
        other.join()


@contextlib.contextmanager
def same_torch_threads() -> Iterator[None]:
    """What happens within leaves the calling thread with as many of PyTorch's threads as it had."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)

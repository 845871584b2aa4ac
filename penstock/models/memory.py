"""How much memory a device has, what this process holds of it, and how to give some back. Bytes; no policy."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import sys
from pathlib import Path

import torch

MADV_DONTNEED = 4  # Linux: private pages are gone at once, and read as zeros or as their file again


def free_bytes(device: torch.device) -> int:
    """Bytes available on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _host()[1]


def host_free_bytes() -> int:
    """Bytes of ordinary memory available now."""
    return _host()[1]


def held_bytes(device: torch.device) -> int:
    """Bytes of the device that this process keeps from others; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError):
        return 0


def memory_usage(device: torch.device) -> float:
    """Fraction of the device's memory in use, 0 to 1."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        total, free = _host()
    return 1.0 - free / total


def trim_memory(device: torch.device) -> None:
    """Collect young garbage, and return what allocators keep for later to the system or the driver.

    No collection of the old: that looks at all that the program has imported and made, and stops every thread of it
    for a fifth of a second. What the engine drops is in no cycle.
    """
    gc.collect(1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # the C library may be another one than glibc
        ctypes.CDLL(None).malloc_trim(0)


def drop_pages(begin: int, end: int) -> None:
    """Give the whole pages between two addresses of private memory back to the system. Linux; elsewhere, nothing."""
    page = mmap.PAGESIZE
    first, last = -(-begin // page) * page, end // page * page
    if sys.platform == "linux" and first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)


def _host() -> tuple[int, int]:
    """(total, available) bytes of this machine."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = page * pages // 2
    limit, used = _cgroup()
    return min(page * pages, limit), min(available, max(0, limit - used))


def _cgroup() -> tuple[int, int]:
    """(limit, used) bytes of the container, if it has a limit."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return int(limit), int(used)
    except (OSError, ValueError):
        return 1 << 62, 0

"""How much memory a device has, uses, and can give back. Bytes and fractions; no policy."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes available on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _host()[1]


def memory_usage(device: torch.device) -> float:
    """Fraction of the device's memory in use, 0 to 1."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        total, free = _host()
    return 1.0 - free / total


def trim_memory(device: torch.device) -> None:
    """Collect garbage and return cached device memory to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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

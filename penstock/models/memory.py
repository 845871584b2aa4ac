"""How much memory a device has, what this process holds of it, and how to give some back. Bytes; no policy."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import mmap
import os
import sys
from pathlib import Path

import torch

UNLIMITED = 1 << 60  # what version 1 of control groups says for no limit is more
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


def container_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int, int] | None:
    """(limit, free) bytes of the control group that allows this process least; None without any limit.

    Groups of both versions count, and the groups around them. Pages of files are free: they go when others are needed.
    """
    found = [memory for folder in _limited_groups(root, own) if (memory := _group_memory(folder)) is not None]
    return min(found, key=lambda memory: memory[1], default=None)


@functools.cache
def _limited_groups(root: Path, own: Path) -> tuple[Path, ...]:
    """The folders of this process's memory groups, and of those around them, that have a limit."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except (OSError, ValueError):
        lines = []
    folders = [root, root / "memory"]  # as a container without namespaces sees its own
    for controllers, path in [(line[1], line[2]) for line in lines if len(line) == 3]:
        if controllers in ("", "memory"):
            base = root / controllers
            inner = base / path.strip().lstrip("/")
            folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(base)]
    return tuple(folder for folder in dict.fromkeys(folders) if _group_memory(folder) is not None)


def _group_memory(folder: Path) -> tuple[int, int] | None:
    """(limit, free) bytes of one group."""
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = (int((folder / name).read_text()) for name in names)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return (limit, max(0, limit - used + _file_pages(folder))) if limit < UNLIMITED else None
    return None


def _file_pages(folder: Path) -> int:
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
    except (OSError, ValueError):
        return 0


def _host() -> tuple[int, int]:
    """(total, available) bytes of this machine, or of the container that this process is in."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = page * pages // 2
    limit, free = container_memory() or (page * pages, available)
    return min(page * pages, limit), min(available, free)

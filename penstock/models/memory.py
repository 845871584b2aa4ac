"""How much memory a device has, what this process holds of it, and how to give some back. Bytes; no policy."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

UNLIMITED = 1 << 60  # version 1 of control groups reports more than this where there is no limit
MADV_DONTNEED = 4  # Linux: private pages are dropped at once, and read as zeros or as their file again
WEIGHT_FILES = (".safetensors", ".bin", ".pt")


def free_bytes(device: torch.device) -> int:
    """Bytes available on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _host()[1]


def host_free_bytes() -> int:
    """Bytes of host memory available now."""
    return _host()[1]


def resident_bytes(device: torch.device) -> int:
    """Bytes of the device that this process occupies; 0 where the system does not say."""
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

    Old garbage is not collected: that visits every object of the program and stops all its threads for a fifth of a
    second. What the engine drops is in no reference cycle.
    """
    gc.collect(1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # the C library may not be glibc
        ctypes.CDLL(None).malloc_trim(0)


def drop_pages(begin: int, end: int) -> None:
    """Return the whole pages between two addresses of private memory to the system. Linux only; elsewhere a no-op."""
    page = mmap.PAGESIZE
    page_begin, page_end = -(-begin // page) * page, end // page * page
    if sys.platform == "linux" and page_begin < page_end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(page_begin), ctypes.c_size_t(page_end - page_begin), MADV_DONTNEED)


def release_file_pages(tensors: Iterable[Tensor]) -> None:
    """Drop the resident pages of the weight files that `tensors` are views of. Linux only; elsewhere a no-op.

    For weights that were mapped, read once and packed: what is still used (an embedding) is read again from the file's
    cache, page by page. Only mappings without a written page are dropped, and never one in which no tensor of the
    caller lies: its owner may unmap it at any moment, and its addresses be used for something new.
    """
    mapped = list(tensors)  # keeps the mappings where they are
    addresses = [tensor.data_ptr() for tensor in mapped if tensor.device.type == "cpu"]
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return
    for begin, end in _clean_regions(lines):
        if any(begin <= address < end for address in addresses):
            drop_pages(begin, end)


def _clean_regions(smaps: list[str]) -> list[tuple[int, int]]:
    """(begin, end) of the mappings of weight files without a page that was written to."""
    regions: list[tuple[int, int]] = []
    region: tuple[int, int] | None = None
    for line in smaps:
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            region = (begin, end) if line.endswith(WEIGHT_FILES) else None
        elif head == "Anonymous:" and region is not None:
            if int(line.split()[1]) == 0:
                regions.append(region)
            region = None
    return regions


def container_memory(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[int, int] | None:
    """(limit, free) bytes of the control group with the least free memory; None without any limit.

    Groups of both versions count, and the groups around them. Pages of files count as free: the system drops them when
    memory is needed.
    """
    groups = [memory for folder in _limited_groups(root, membership) if (memory := _group_memory(folder)) is not None]
    return min(groups, key=lambda memory: memory[1], default=None)


@functools.cache
def _limited_groups(root: Path, membership: Path) -> tuple[Path, ...]:
    """The folders of this process's memory groups, and of those around them, that have a limit."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except (OSError, ValueError):
        lines = []
    folders = [root, root / "memory"]  # where a container without namespaces sees its own group
    for controllers, path in [(line[1], line[2]) for line in lines if len(line) == 3]:
        if controllers in ("", "memory"):
            base = root / controllers
            group = base / path.strip().lstrip("/")
            folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]
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

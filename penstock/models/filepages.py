"""Gives back the memory of weight files that were mapped, read once and packed: `release_file_pages`.

Touches only the mappings in which the caller's tensors lie, and only where all pages are unchanged copies of the file:
what is still used (an embedding) is read again from the file's cache, page by page. Never a mapping of somebody else,
who may unmap it at any moment and use its addresses for something new. Linux; elsewhere it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from penstock.models.memory import drop_pages

SUFFIXES = (".safetensors", ".bin", ".pt")


def release_file_pages(tensors: Iterable[Tensor]) -> None:
    """Drop the resident pages of the weight files that `tensors` are views of, unless something was written there."""
    held = list(tensors)  # keeps the mappings where they are
    addresses = [tensor.data_ptr() for tensor in held if tensor.device.type == "cpu"]
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return
    for begin, end in _clean_regions(lines):
        if any(begin <= address < end for address in addresses):
            drop_pages(begin, end)


def _clean_regions(lines: list[str]) -> list[tuple[int, int]]:
    """(begin, end) of the mappings of weight files without a page of their own."""
    found, current = [], None
    for line in lines:
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            current = (begin, end) if line.endswith(SUFFIXES) else None
        elif head == "Anonymous:" and current is not None:
            if int(line.split()[1]) == 0:
                found.append(current)
            current = None
    return found

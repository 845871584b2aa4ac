"""Cache blocks as rows of memory: neighbours are copied together, and what holds nothing goes back to the system.

Owns no memory; every tensor is the caller's. Called by the storages of K/V.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from penstock.models.memory import drop_pages

Run = tuple[int, int, int]  # first source, first target, how many


def runs(pairs: Iterable[tuple[int, int]]) -> list[Run]:
    """(source, target) pairs with their neighbours put together."""
    found: list[Run] = []
    for source, target in sorted(pairs):
        if found:
            first, onto, count = found[-1]
            if (source, target) == (first + count, onto + count):
                found[-1] = (first, onto, count + 1)
                continue
        found.append((source, target, 1))
    return found


def copy_rows(source: Tensor, target: Tensor, moves: Sequence[Run]) -> None:
    """Copy rows, in place, from and to any devices; none of `target` is read as one of `source`."""
    for first, onto, count in moves:
        target[onto : onto + count].copy_(source[first : first + count], non_blocking=True)


def give_back(rows: Tensor, first: int, end: int) -> None:
    """Let the system have the pages of rows [first, end), which read as zeros from then on. Rows are side by side."""
    if rows.device.type == "cpu" and first < end:
        size = rows.stride(0) * rows.element_size()
        drop_pages(rows.data_ptr() + first * size, rows.data_ptr() + end * size)

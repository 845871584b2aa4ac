"""What every storage of K/V shares: the shape of a layer, moves of whole blocks, and giving memory back.

Owns no memory: every tensor is the caller's. Called by the storages in `torch_attention` and `panels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.errors import OutOfMemory
from penstock.models.memory import drop_pages

Run = tuple[int, int, int]  # first source row, first target row, number of rows


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token: `heads` x (`key_dim` + `value_dim`) numbers of `dtype`."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def cache_out_of_memory(
    device: torch.device, shapes: Sequence[LayerShape], num_slots: int, num_host_slots: int
) -> OutOfMemory:
    """The error that says what a K/V cache of so many tokens would take, and what to change."""
    num_bytes = (num_slots + num_host_slots) * sum(shape.bytes_per_token for shape in shapes)
    return OutOfMemory(
        f"{device.type.upper()} out of memory: the K/V cache needs {num_bytes / 2**20:.0f} MiB for {num_slots} tokens "
        f"and {num_host_slots} of swap; lower memory_pool_size (bytes), kv_cache_tokens or swap_space"
    )


def contiguous_runs(pairs: Iterable[tuple[int, int]]) -> list[Run]:
    """Merge (source, target) pairs that continue each other on both sides."""
    runs: list[Run] = []
    for source, target in sorted(pairs):
        if runs:
            first_source, first_target, count = runs[-1]
            if (source, target) == (first_source + count, first_target + count):
                runs[-1] = (first_source, first_target, count + 1)
                continue
        runs.append((source, target, 1))
    return runs


def copy_rows(source: Tensor, target: Tensor, runs: Sequence[Run]) -> None:
    """Copy rows between tensors on any devices; where both are one tensor, no row is both source and target."""
    for first_source, first_target, count in runs:
        rows = source[first_source : first_source + count]
        target[first_target : first_target + count].copy_(rows, non_blocking=True)


def release_memory(tensor: Tensor) -> None:
    """Give the memory of a tensor back until `restore_memory`; its values are lost. It must have a storage of its own.

    On a CPU the addresses stay, since kernels may hold them.
    """
    if tensor.device.type == "cpu":
        drop_pages(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    else:
        tensor.untyped_storage().resize_(0)


def restore_memory(tensor: Tensor) -> None:
    """Take back what `release_memory` gave; the values are undefined. Raises `torch.OutOfMemoryError`."""
    if not tensor.untyped_storage().nbytes():
        tensor.untyped_storage().resize_(tensor.nbytes)


def release_rows(rows: Tensor, begin: int, end: int) -> None:
    """Give the pages of rows [begin, end) back to the system; from then on they read as zeros. CPU only."""
    if rows.device.type == "cpu" and begin < end:
        size = rows.stride(0) * rows.element_size()
        drop_pages(rows.data_ptr() + begin * size, rows.data_ptr() + end * size)

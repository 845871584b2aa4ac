"""`KVStorage`: the tensors behind the block table, one pair (keys, values) per attention layer, and those on the host.

Owns the memory; knows nothing of sequences, reference counts or prefixes (that is `cache`). Called by the executor.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.errors import OutOfMemory
from penstock.kernels import reference
from penstock.models.blocks import copy_rows, give_back, runs


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


def no_room(device: torch.device, shapes: Sequence[LayerShape], slots: int, host_slots: int) -> OutOfMemory:
    """The error that says what a cache of so many tokens would have taken, and what to change."""
    wanted = (slots + host_slots) * sum(shape.bytes_per_token for shape in shapes)
    return OutOfMemory(
        f"{device.type.upper()} out of memory: the K/V cache wanted {wanted / 2**20:.0f} MiB for {slots} tokens and "
        f"{host_slots} of swap; lower memory_pool_size (bytes), kv_cache_tokens or swap_space"
    )


class KVStorage:
    """K/V of `num_blocks` x `block_size` slots for every layer: `keys[i]` is [slots, heads, key_dim].

    The tier of `num_host_blocks` blocks lies in ordinary memory, pinned where the device is another one.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        device: torch.device,
        num_host_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self._device = device
        slots = num_blocks * block_size
        try:
            self.keys = [_zeros((slots, s.heads, s.key_dim), s.dtype, device) for s in shapes]
            self.values = [_zeros((slots, s.heads, s.value_dim), s.dtype, device) for s in shapes]
            self._rows = [cache.view(num_blocks, -1) for cache in (*self.keys, *self.values)]
            self._host = [_host_like(rows, num_host_blocks) for rows in self._rows]
        except (RuntimeError, MemoryError, OSError) as error:
            raise no_room(device, shapes, slots, num_host_blocks * block_size) from error

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer."""
        if not copies:
            return
        pairs = torch.tensor(copies, dtype=torch.int64, device=self.keys[0].device)
        offsets = torch.arange(self.block_size, dtype=torch.int64, device=pairs.device)
        source, destination = ((pairs[:, i, None] * self.block_size + offsets).reshape(-1) for i in (0, 1))
        for cache in (*self.keys, *self.values):
            reference.copy_slots(cache, source, destination)

    def swap(self, out: Sequence[tuple[int, int]], back: Sequence[tuple[int, int]]) -> None:
        """Move whole blocks out to the host, as (block, place), and then in, as (place, block); done on return."""
        leaving, coming = runs(out), runs(back)
        for rows, host in zip(self._rows, self._host, strict=True):
            copy_rows(rows, host, leaving)
            copy_rows(host, rows, coming)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def give_back(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Let the system have the memory of blocks and places that hold nothing, where it can be had piece by piece."""
        for tensors, unused in ((self._rows, blocks), (self._host, places)):
            for first, _, count in runs(zip(unused, unused, strict=True)):
                for rows in tensors:
                    give_back(rows, first, first + count)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        return self.keys[index], self.values[index]


def _host_like(rows: Tensor, count: int) -> Tensor:
    """Room on the host for `count` rows like these. Only pinned memory is copied to and fro at a bus's full speed."""
    if rows.device.type == "cuda":
        return torch.empty(count, rows.shape[1], dtype=rows.dtype, device="cpu", pin_memory=True)
    return _zeros((count, rows.shape[1]), rows.dtype, rows.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no host memory until they are written: fresh pages of the operating system."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)

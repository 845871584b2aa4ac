"""`KVStorage`: the tensors behind the block table, one pair (keys, values) per attention layer.

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


class KVStorage:
    """K/V of `num_blocks` x `block_size` slots for every layer: `keys[i]` is [slots, heads, key_dim]."""

    def __init__(self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        slots = num_blocks * block_size
        try:
            self.keys = [_zeros((slots, s.heads, s.key_dim), s.dtype, device) for s in shapes]
            self.values = [_zeros((slots, s.heads, s.value_dim), s.dtype, device) for s in shapes]
        except (RuntimeError, MemoryError, OSError) as error:
            wanted = slots * sum(s.bytes_per_token for s in shapes)
            raise OutOfMemory(
                f"{device.type.upper()} out of memory: the K/V cache wanted {wanted / 2**20:.0f} MiB "
                f"for {slots} tokens; lower memory_pool_size (bytes) or kv_cache_tokens"
            ) from error

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer."""
        if not copies:
            return
        pairs = torch.tensor(copies, dtype=torch.int64, device=self.keys[0].device)
        offsets = torch.arange(self.block_size, device=pairs.device)
        source, destination = ((pairs[:, i, None] * self.block_size + offsets).reshape(-1) for i in (0, 1))
        for cache in (*self.keys, *self.values):
            reference.copy_slots(cache, source, destination)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        return self.keys[index], self.values[index]


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no host memory until they are written: fresh pages of the operating system.

    Padding reads slots that nothing wrote, so they must be finite.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)

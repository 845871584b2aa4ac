"""Attention over paged keys and values with the compiled kernels: `PanelCache`, `AttentionMetadata`, `attend`.

Owns the memory of a layer's cache and the index arrays of a step; every other tensor is the caller's. Used by the
attention of `models` and by `program`. The layout of a panel is documented in `cpu/kv_cache.c`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.native import FLOATS, TYPES, Kernels, check, operand, pages, strided
from penstock.kernels.structures import AttentionStruct, CacheStruct, Long, MetadataStruct, Ptr

PANEL = 16  # tokens of a cache panel: LANES in cpu/vectors.h
TILE = 64  # keys of an attention tile: KEYS in cpu/vectors.h
MAX_HEAD = 512


class PanelCache:
    """Keys and values of one layer: `panels` x 16 slots of `heads` heads. `dtype` int8 stores a scale per token.

    `compute` is the dtype of products over them.
    """

    def __init__(
        self, kernels: Kernels, panels: int, heads: int, key_dim: int, value_dim: int,
        dtype: torch.dtype, compute: torch.dtype,
    ) -> None:  # fmt: skip
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self._library, self._pool = kernels.library, kernels.pool
        self._struct = CacheStruct(0, heads, key_dim, value_dim, TYPES[dtype], TYPES[compute])
        self.pointer = ctypes.addressof(self._struct)
        padding, size = (int(self._library.ps_cache_bytes(Ptr(self.pointer), Long(n))) for n in (0, panels))
        self._memory = pages(size)
        self._struct.base = self._memory.data_ptr()
        self.panels = self._memory[: size - padding].view(panels, -1)  # uint8 [panels, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of address space; the system allocates its pages when they are touched."""
        return self._memory.numel()

    def touch(self) -> None:
        """Let the system allocate all pages now; only while nothing is stored."""
        self._library.ps_touch(self._pool, Ptr(self._memory.data_ptr()), Long(self._memory.numel()))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, heads, key_dim] and values [n, heads, value_dim] of slots (int64 [n]), in float32."""
        count = len(slots)
        keys, values = (
            torch.empty(count, self.heads, dim, dtype=torch.float32, device="cpu")
            for dim in (self.key_dim, self.value_dim)
        )
        indices = operand(slots, torch.int64, count)
        self._library.ps_read_slots(
            Ptr(self.pointer), Ptr(indices), Long(count), Ptr(keys.data_ptr()), Ptr(values.data_ptr())
        )
        return keys, values

    def copy(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots, in place; both int64, without overlap."""
        indices = (Ptr(operand(slots, torch.int64, len(source))) for slots in (source, destination))
        self._library.ps_copy_slots(Ptr(self.pointer), *indices, Long(len(source)))


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How a layer attends: score scaling, window (tokens seen, itself included), soft cap, sink logits [H]."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionMetadata:
    """The index arrays of one step for `attend`: `attention_metadata` in cpu/rotary.c says what each holds.

    `slots` is int64; the others are converted to int32.
    """

    def __init__(self, by_panel: bool, slots: np.ndarray, **arrays: np.ndarray) -> None:
        self._arrays = {name: np.ascontiguousarray(array, dtype=np.int32) for name, array in arrays.items()}
        self._slots = np.ascontiguousarray(slots, dtype=np.int64)
        pointers = {name: array.ctypes.data for name, array in self._arrays.items()}
        self.tokens, tasks = len(slots), len(self._arrays["task_row"])
        if any(len(array) != tasks for name, array in self._arrays.items() if name.startswith("task_")):
            raise AssertionError("a step's tasks are not described in full")
        self._struct = MetadataStruct(
            tokens=self.tokens, tasks=tasks, by_panel=by_panel, slots=self._slots.ctypes.data, **pointers
        )
        self.pointer = ctypes.addressof(self._struct)


class CacheTable:
    """The caches of all layers, for a `Program`."""

    def __init__(self, caches: Sequence[PanelCache]) -> None:
        self.caches = caches
        self._addresses = (Ptr * len(caches))(*(cache.pointer for cache in caches))
        self.pointer = ctypes.addressof(self._addresses)


def attend(
    kernels: Kernels, cache: PanelCache, metadata: AttentionMetadata,
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, *,
    scaling: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the step's keys and values into the cache, then attend: out [T, H, V].

    query [T, H, D], key [T, K, D], value [T, K, V] of one dtype, with the last dimension contiguous. `sinks` is
    float32 [H].
    """
    dtype, tokens, heads = query.dtype, metadata.tokens, query.shape[1]
    if heads % cache.heads:
        raise AssertionError(f"{heads} query heads cannot share {cache.heads} key/value heads")
    call = AttentionStruct(
        cache.pointer, metadata.pointer, None,
        strided(query, dtype, tokens, heads, cache.key_dim),
        strided(key, dtype, tokens, cache.heads, cache.key_dim),
        strided(value, dtype, tokens, cache.heads, cache.value_dim),
        operand(out, dtype, tokens, heads, cache.value_dim),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        heads, FLOATS[dtype], scaling, softcap or 0.0, window or 0,
        None if sinks is None else operand(sinks, torch.float32, heads),
    )  # fmt: skip
    check(kernels.library.ps_attention(kernels.pool, ctypes.addressof(call)))

"""Attention over paged keys and values, over the compiled kernels: `PanelCache`, `Steps`, `attend`.

Owns the memory of a layer's cache and the index arrays of a step; every other tensor is the caller's. Used by the
attention of `models` and by `program`. The layout of a panel is documented in `native.c`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.native import TYPES, Float, Int, Kernels, Long, Ptr, address, check, pages, struct

PANEL = 16  # tokens of a cache panel: LANES in native.c
TILE = 64  # keys of an attention tile: KEYS in native.c
MAX_HEAD = 512

_Cache = struct("cache", base=Ptr, heads=Long, key_dim=Long, value_dim=Long, format=Int, compute=Int)
_Step = struct(
    "step",
    tokens=Long,
    bundles=Long,
    whole=Long,
    **dict.fromkeys(("slots", "first", "start", "table", "tables", "row", "rows", "begin", "end", "shared"), Ptr),
)
AttentionCall = struct(
    "attention",
    **dict.fromkeys(("c", "s", "r", "query", "key", "value", "out"), Ptr),
    **dict.fromkeys(("query_token", "query_head", "key_token", "key_head", "value_token", "value_head", "heads"), Long),
    type=Int,
    scaling=Float,
    softcap=Float,
    window=Long,
    sinks=Ptr,
    layer=Long,
)


class PanelCache:
    """Keys and values of one layer: `panels` x 16 slots of `heads` heads. `dtype` int8 stores a scale per token."""

    def __init__(
        self, kernels: Kernels, panels: int, heads: int, key_dim: int, value_dim: int,
        dtype: torch.dtype, compute: torch.dtype,
    ) -> None:  # fmt: skip
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self._library, self._pool = kernels.library, kernels.pool
        self._struct = _Cache(0, heads, key_dim, value_dim, TYPES[dtype], TYPES[compute])
        self.pointer = ctypes.addressof(self._struct)
        spare, needed = (int(self._library.ps_cache_bytes(Ptr(self.pointer), Long(n))) for n in (0, panels))
        self._memory = pages(needed)
        self._struct.base = self._memory.data_ptr()
        self.panels = self._memory[: needed - spare].view(panels, -1)  # uint8 [panels, bytes]

    def touch(self) -> None:
        """Have the system find the memory's pages now; only while nothing is stored."""
        self._library.ps_touch(self._pool, Ptr(self._memory.data_ptr()), Long(self._memory.numel()))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, heads, key_dim] and values of slots (int64 [n]), in float32."""
        keys, values = (torch.empty(len(slots), self.heads, dim) for dim in (self.key_dim, self.value_dim))
        self._library.ps_read_slots(
            Ptr(self.pointer), Ptr(address(slots)), Long(len(slots)), Ptr(address(keys)), Ptr(address(values))
        )
        return keys, values

    def copy(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots, in place; both int64, without overlap."""
        ends = Ptr(address(source)), Ptr(address(destination))
        self._library.ps_copy_slots(Ptr(self.pointer), *ends, Long(len(source)))


class Steps:
    """The index arrays of one step for `attend`; see `struct step` in native.c. All int32 but `slots` (int64)."""

    def __init__(self, whole: bool, slots: np.ndarray, **arrays: np.ndarray) -> None:
        self._arrays = {name: np.ascontiguousarray(array, dtype=np.int32) for name, array in arrays.items()}
        self._slots = np.ascontiguousarray(slots, dtype=np.int64)
        pointers = {name: array.ctypes.data for name, array in self._arrays.items()}
        self._struct = _Step(
            tokens=len(slots), bundles=len(self._arrays["row"]), whole=whole, slots=self._slots.ctypes.data, **pointers
        )
        self.pointer = ctypes.addressof(self._struct)


def table_of(caches: Sequence[PanelCache]) -> Any:
    """The caches of all layers as an array of addresses; they must outlive it."""
    return (Ptr * len(caches))(*(cache.pointer for cache in caches))


def attend(
    kernels: Kernels, cache: PanelCache, steps: Steps, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *,
    scaling: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the step's keys and values into the cache, then attend: out [T, H, V].

    query [T, H, D], key [T, K, D], value [T, K, V] of one dtype, with the last dimension contiguous. `sinks` is
    float32 [H].
    """
    call = AttentionCall(
        cache.pointer, steps.pointer, None,
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        query.shape[1], TYPES[query.dtype], scaling, softcap or 0.0, window or 0, address(sinks),
    )  # fmt: skip
    check(kernels.library.ps_attention(kernels.pool, ctypes.addressof(call)))

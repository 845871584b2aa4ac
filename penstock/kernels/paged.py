"""Attention over paged keys and values, over the compiled kernels: `PanelCache`, `Steps`, `attend`.

Owns the memory of a layer's cache and the index arrays of a step; every other tensor is the caller's. Used by the
attention of `models` and by `program`. The layout of a panel is documented in `native.c`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.native import (
    FLOATS,
    TYPES,
    Float,
    Int,
    Kernels,
    Long,
    Ptr,
    check,
    operand,
    pages,
    strided,
    struct,
)

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

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory, whether the system has found its pages or not."""
        return self._memory.numel()

    def touch(self) -> None:
        """Have the system find the memory's pages now; only while nothing is stored."""
        self._library.ps_touch(self._pool, Ptr(self._memory.data_ptr()), Long(self._memory.numel()))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, heads, key_dim] and values of slots (int64 [n]), in float32."""
        count = len(slots)
        keys, values = (
            torch.empty(count, self.heads, dim, dtype=torch.float32, device="cpu")
            for dim in (self.key_dim, self.value_dim)
        )
        at = operand(slots, torch.int64, count)
        self._library.ps_read_slots(
            Ptr(self.pointer), Ptr(at), Long(count), Ptr(keys.data_ptr()), Ptr(values.data_ptr())
        )
        return keys, values

    def copy(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots, in place; both int64, without overlap."""
        ends = (Ptr(operand(slots, torch.int64, len(source))) for slots in (source, destination))
        self._library.ps_copy_slots(Ptr(self.pointer), *ends, Long(len(source)))


class Steps:
    """The index arrays of one step for `attend`; see `struct step` in native.c. All int32 but `slots` (int64)."""

    def __init__(self, whole: bool, slots: np.ndarray, **arrays: np.ndarray) -> None:
        self._arrays = {name: np.ascontiguousarray(array, dtype=np.int32) for name, array in arrays.items()}
        self._slots = np.ascontiguousarray(slots, dtype=np.int64)
        pointers = {name: array.ctypes.data for name, array in self._arrays.items()}
        self.tokens, bundles = len(slots), len(self._arrays["row"])
        if any(len(self._arrays[name]) != bundles for name in ("rows", "begin", "end", "shared")):
            raise AssertionError("a step's bundles are not described in full")
        self._struct = _Step(
            tokens=self.tokens, bundles=bundles, whole=whole, slots=self._slots.ctypes.data, **pointers
        )
        self.pointer = ctypes.addressof(self._struct)


class CacheTable:
    """The caches of all layers, for a `Program`."""

    def __init__(self, caches: Sequence[PanelCache]) -> None:
        self.caches = caches
        self._addresses = (Ptr * len(caches))(*(cache.pointer for cache in caches))
        self.pointer = ctypes.addressof(self._addresses)


def attend(
    kernels: Kernels, cache: PanelCache, steps: Steps, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *,
    scaling: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the step's keys and values into the cache, then attend: out [T, H, V].

    query [T, H, D], key [T, K, D], value [T, K, V] of one dtype, with the last dimension contiguous. `sinks` is
    float32 [H].
    """
    dtype, tokens, heads = query.dtype, steps.tokens, query.shape[1]
    if heads % cache.heads:
        raise AssertionError(f"{heads} query heads cannot share {cache.heads} key/value heads")
    call = AttentionCall(
        cache.pointer, steps.pointer, None,
        strided(query, dtype, tokens, heads, cache.key_dim),
        strided(key, dtype, tokens, cache.heads, cache.key_dim),
        strided(value, dtype, tokens, cache.heads, cache.value_dim),
        operand(out, dtype, tokens, heads, cache.value_dim),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        heads, FLOATS[dtype], scaling, softcap or 0.0, window or 0,
        None if sinks is None else operand(sinks, torch.float32, heads),
    )  # fmt: skip
    check(kernels.library.ps_attention(kernels.pool, ctypes.addressof(call)))

"""Attention over paged keys and values, over the compiled kernels: `PanelCache`, `Steps`, `attend`, `FusedAttention`.

Owns the memory of a layer's cache and the index arrays of a step; every other tensor is the caller's. Used by the
attention of `models` and the fused layers of `optimizers`. The layout of a panel is documented in `native.c`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.native import TYPES, Float, Int, Kernels, Long, Ptr, address, check, floats, pages, struct

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
_Rotary = struct("rotary", norm=Int, type=Int, width=Long, eps=Float, query_norm=Ptr, key_norm=Ptr, cos=Ptr, sin=Ptr)
_Attention = struct(
    "attention",
    **dict.fromkeys(("c", "s", "r", "query", "key", "value", "out"), Ptr),
    **dict.fromkeys(("query_token", "query_head", "key_token", "key_head", "value_token", "value_head", "heads"), Long),
    type=Int,
    scaling=Float,
    softcap=Float,
    window=Long,
    sinks=Ptr,
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
        self._memory = pages(int(self._library.ps_cache_bytes(Ptr(self.pointer), Long(panels))))
        self._struct.base = self._memory.data_ptr()

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


class Rotary:
    """Norm of queries and keys (0 none, 1 per head, 2 over all heads) and rotary positions, applied in place."""

    def __init__(self, norm: int, eps: float, query_norm: Tensor | None, key_norm: Tensor | None) -> None:
        self._keep = [None if w is None else floats(w) for w in (query_norm, key_norm)]
        self._struct = _Rotary(norm, 0, 0, eps, address(self._keep[0]), address(self._keep[1]), None, None)
        self.pointer = ctypes.addressof(self._struct)

    def at(self, cos: Tensor | None, sin: Tensor | None) -> int:
        """Set the positions of a step, cos and sin [T, width]; the address to call with."""
        struct = self._struct
        if cos is None or sin is None:
            struct.width = 0
        else:
            struct.type, struct.width = TYPES[cos.dtype], cos.shape[-1]
            struct.cos, struct.sin = cos.data_ptr(), sin.data_ptr()
        return self.pointer


class FusedAttention:
    """Attention over rows of a fused projection [T, (H D | K D | K V)], with its norms and rotary positions.

    The call is prepared once; a step fills in where its tensors are.
    """

    def __init__(
        self, heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, *, scaling: float,
        window: int | None, softcap: float | None, sinks: Tensor | None, rotary: Rotary,
    ) -> None:  # fmt: skip
        width = heads * key_dim + kv_heads * (key_dim + value_dim)
        self._width, self._dtype, self._rotary = heads * value_dim, dtype, rotary
        self._key = heads * key_dim * dtype.itemsize
        self._value = self._key + kv_heads * key_dim * dtype.itemsize
        self._sinks = None if sinks is None else floats(sinks)
        self._call = _Attention(
            None, None, None, None, None, None, None, width, key_dim, width, key_dim, width, value_dim, heads,
            TYPES[dtype], scaling, softcap or 0.0, window or 0, address(self._sinks),
        )  # fmt: skip
        self._pointer = ctypes.addressof(self._call)

    def __call__(self, paged: Any, layer: int, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Attend for one layer of a step: [T, H V]. `paged` has `kernels`, `caches`, `steps`; cos and sin [1, T, W]."""
        out = torch.empty(qkv.shape[0], self._width, dtype=self._dtype)
        call, base, kernels = self._call, qkv.data_ptr(), paged.kernels
        call.c, call.s, call.r = paged.caches[layer].pointer, paged.steps.pointer, self._rotary.at(cos, sin)
        call.query, call.key, call.value, call.out = base, base + self._key, base + self._value, out.data_ptr()
        check(kernels.library.ps_attention(kernels.pool, self._pointer))
        return out


def attend(
    kernels: Kernels, cache: PanelCache, steps: Steps, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *,
    scaling: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    rotary: int = 0,
) -> None:  # fmt: skip
    """Write the step's keys and values into the cache, then attend: out [T, H, V].

    query [T, H, D], key [T, K, D], value [T, K, V] of one dtype, with the last dimension contiguous. With `rotary`
    (see `Rotary.at`) query is finished in place first, and key on its way into the cache. `sinks` is float32 [H].
    """
    call = _Attention(
        cache.pointer, steps.pointer, rotary or None,
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        query.shape[1], TYPES[query.dtype], scaling, softcap or 0.0, window or 0, address(sinks),
    )  # fmt: skip
    check(kernels.library.ps_attention(kernels.pool, ctypes.addressof(call)))

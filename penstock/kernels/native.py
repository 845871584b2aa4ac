"""The compiled CPU kernels as Python objects: `Kernels` (a pool of threads), `Linear`, `Norm`, `PanelCache`, `Steps`.

Owns the pool and the packed copies of weights; every other tensor is the caller's. Holds no lock while a kernel runs.
Used by one thread at a time. Layouts and the order of sums are documented in `native.c`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.build import build

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
ACTIVATIONS = ("identity", "silu", "gelu_tanh", "gelu", "relu")
STORE, ADD, GATED = 0, 1, 2
NO_NORM, RMS, LAYER = 0, 1, 2
PANEL = 16  # tokens of a cache panel: LANES in native.c
TILE = 64  # keys of an attention tile: KEYS in native.c
MAX_HEAD = 512

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int32, ctypes.c_float


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Linear = _struct(
    "linear",
    **dict.fromkeys(("n", "k"), _L),
    **dict.fromkeys(("format", "mode", "act", "in_type", "out_type", "norm_kind"), _I),
    **dict.fromkeys(("scale", "eps"), _F),
    **dict.fromkeys(("weights", "bias", "scales", "offsets", "norm_weight", "norm_bias"), _P),
)
_Packing = _struct("packing", rows=_P, n=_L, k=_L, type=_I, format=_I, weights=_P, scales=_P, offsets=_P)
_Norm = _struct("norm", n=_L, kind=_I, dtype=_I, eps=_F, scale=_F, weight=_P, bias=_P)
_Cache = _struct("cache", base=_P, heads=_L, key_dim=_L, value_dim=_L, format=_I, compute=_I)
_Step = _struct(
    "step",
    tokens=_L,
    bundles=_L,
    whole=_L,
    **dict.fromkeys(("slots", "first", "start", "table", "tables", "row", "rows", "begin", "end", "shared"), _P),
)
_Rotary = _struct("rotary", norm=_I, type=_I, width=_L, eps=_F, query_norm=_P, key_norm=_P, cos=_P, sin=_P)
_Survey = _struct("survey", logits=_P, rows=_L, width=_L, block=_L, peaks=_P, totals=_P)
_Attention = _struct(
    "attention",
    **dict.fromkeys(("c", "s", "r", "query", "key", "value", "out"), _P),
    **dict.fromkeys(("query_token", "query_head", "key_token", "key_head", "value_token", "value_head", "heads"), _L),
    type=_I,
    scaling=_F,
    softcap=_F,
    window=_L,
    sinks=_P,
)


def available() -> bool:
    """Whether the compiled kernels can be used here."""
    return build().library is not None


def note() -> str:
    """How the kernels were compiled, or why there are none."""
    return build().note


class Kernels:
    """A pool of `threads` threads that run the compiled kernels, or another build's `library`. `close()` ends them."""

    def __init__(self, threads: int, library: ctypes.CDLL | None = None) -> None:
        library = library or build().library
        assert library is not None, "ask available() first"
        self.library = library
        self.threads = threads
        for name in ("ps_pool_new", "ps_columns", "ps_lanes", "ps_cache_bytes"):
            getattr(library, name).restype = _L if name != "ps_pool_new" else _P
        library.ps_linear.argtypes = [_P, _P, _P, _L, _L, _P, _L]
        library.ps_norm.argtypes = [_P, _P, _P, _L, _P, _I]
        library.ps_attention.argtypes = [_P, _P]
        self.pool = _P(library.ps_pool_new(threads))
        self.lanes = int(library.ps_lanes())

    def close(self) -> None:
        """End the threads. Nothing made from these kernels may run afterwards."""
        if self.pool:
            self.library.ps_pool_free(self.pool)
            self.pool = _P()

    def columns(self, n: int) -> int:
        """Packed columns of n outputs: n rounded up to whole panels."""
        return int(self.library.ps_columns(_L(n)))


class Norm:
    """RMSNorm or LayerNorm over rows of `weight.shape[0]` numbers, computed in float32."""

    def __init__(
        self, kernels: Kernels, kind: int, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> None:
        self.kind, self.eps = kind, eps
        self.weight, self.bias = _floats(weight), None if bias is None else _floats(bias)
        self._kernels = kernels
        self._struct = _Norm(len(weight), kind, TYPES[dtype], eps, 1.0, _at(self.weight), _at(self.bias))
        self._pointer = ctypes.addressof(self._struct)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The norm of x [M, N]; into `out` if given."""
        out = torch.empty_like(x) if out is None else out
        self._run(x, out, 0)
        return out

    def add_to(self, out: Tensor, x: Tensor, scale: float = 1.0) -> None:
        """out += scale * norm(x), both [M, N], in place."""
        self._struct.scale = scale
        self._run(x, out, 1)

    def _run(self, x: Tensor, out: Tensor, add: int) -> None:
        k = self._kernels
        _ok(k.library.ps_norm(k.pool, self._pointer, x.data_ptr(), x.shape[0], out.data_ptr(), add))


class Linear:
    """y = act(norm(x) W^T + b) with packed weights W [N, K], the rows of several matrices one below the other.

    `mode` STORE writes y, ADD adds scale * y to the output, GATED takes two equal matrices and gives
    act(first) * second. `quantize` packs int8 weights with a scale per output and quantizes each row of x.
    """

    def __init__(
        self,
        kernels: Kernels,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        mode: int = STORE,
        act: str = "identity",
        norm: Norm | None = None,
        scale: float = 1.0,
        quantize: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        dtype = weights[0].dtype
        self.n, self.k = sum(len(w) for w in weights), weights[0].shape[1]
        self.width = self.n // 2 if mode == GATED else self.n
        self.dtype = out_dtype or dtype
        self.num_bytes = 0
        self._kernels = kernels
        self._norm = norm
        source = self._sources(weights, mode)
        self._bias = self._columns_of(biases, weights, mode)
        format = TYPES[torch.int8 if quantize else dtype]
        self._pack(weights, source, format)
        self._struct = _Linear(
            n=self.n, k=self.k, format=format, mode=mode, act=ACTIVATIONS.index(act), in_type=TYPES[dtype],
            out_type=TYPES[self.dtype], norm_kind=norm.kind if norm else NO_NORM, scale=scale,
            eps=norm.eps if norm else 0.0, weights=_at(self._weights), bias=_at(self._bias), scales=_at(self._scales),
            offsets=_at(self._offsets), norm_weight=_at(norm.weight if norm else None),
            norm_bias=_at(norm.bias if norm else None),
        )  # fmt: skip
        self._pointer = ctypes.addressof(self._struct)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Apply to x [M, K], rows contiguous: `out` [M, N], made if not given."""
        k, rows = self._kernels, x.shape[0]
        if out is None:
            out = torch.empty(rows, self.width, dtype=self.dtype)
        at = (x.data_ptr(), rows, x.stride(0), out.data_ptr(), out.stride(0))
        _ok(k.library.ps_linear(k.pool, self._pointer, *at))
        return out

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` (int64 [T]) of W as [T, K]."""
        out = torch.empty(len(ids), self.k, dtype=dtype)
        library = self._kernels.library
        library.ps_embed(_P(self._pointer), _P(ids.data_ptr()), _L(len(ids)), _P(out.data_ptr()), _I(TYPES[dtype]))
        return out

    def _order(self, mode: int) -> np.ndarray:
        """Which output each packed column is; -1 for padding. GATED panels alternate `lanes` gates and `lanes` ups."""
        columns = self._kernels.columns(self.n)
        order = np.arange(columns)
        if mode == GATED:
            lanes, half = self._kernels.lanes, self.n // 2
            panel, lane = order // (2 * lanes), order % (2 * lanes)
            place = panel * lanes + lane % lanes
            return np.where(place < half, place + (lane >= lanes) * half, -1)
        return np.where(order < self.n, order, -1)

    def _sources(self, weights: Sequence[Tensor], mode: int) -> np.ndarray:
        """The address of the matrix row behind each packed column."""
        assert all(w.stride(1) == 1 and w.device.type == "cpu" for w in weights)
        rows = np.concatenate(
            [np.arange(len(w)) * (w.stride(0) * w.element_size()) + w.data_ptr() for w in weights]
        ).astype(np.int64)
        order = self._order(mode)
        return np.where(order >= 0, rows[order], 0)

    def _columns_of(self, biases: Sequence[Tensor | None], weights: Sequence[Tensor], mode: int) -> Tensor | None:
        if all(bias is None for bias in biases):
            return None
        flat = torch.cat(
            [torch.zeros(len(w)) if b is None else b.detach().float() for b, w in zip(biases, weights, strict=True)]
        )
        order = torch.from_numpy(self._order(mode))
        return torch.where(order >= 0, flat[order], 0.0).contiguous()

    def _pack(self, weights: Sequence[Tensor], source: np.ndarray, format: int) -> None:
        columns, per = len(source), {1: 2, 3: 4}.get(format, 1)
        self._weights = pages(columns * -(-self.k // per) * (2 if format == 2 else 4))
        quantized = format == TYPES[torch.int8]
        self._scales = torch.zeros(columns) if quantized else None
        self._offsets = torch.zeros(columns, dtype=torch.int32) if quantized else None
        self.num_bytes = self._weights.numel()
        packing = _Packing(
            source.ctypes.data, columns, self.k, TYPES[weights[0].dtype], format, _at(self._weights),
            _at(self._scales), _at(self._offsets),
        )  # fmt: skip
        self._kernels.library.ps_pack(self._kernels.pool, ctypes.byref(packing))


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
        self._memory = pages(int(self._library.ps_cache_bytes(_P(self.pointer), _L(panels))))
        self._struct.base = self._memory.data_ptr()

    def touch(self) -> None:
        """Have the system find the memory's pages now; only while nothing is stored."""
        self._library.ps_touch(self._pool, _P(self._memory.data_ptr()), _L(self._memory.numel()))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n, heads, key_dim] and values of slots (int64 [n]), in float32."""
        keys, values = (torch.empty(len(slots), self.heads, dim) for dim in (self.key_dim, self.value_dim))
        self._library.ps_read_slots(_P(self.pointer), _P(_at(slots)), _L(len(slots)), _P(_at(keys)), _P(_at(values)))
        return keys, values

    def copy(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots, in place; both int64, without overlap."""
        self._library.ps_copy_slots(_P(self.pointer), _P(_at(source)), _P(_at(destination)), _L(len(source)))


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
        self._keep = [None if w is None else _floats(w) for w in (query_norm, key_norm)]
        self._struct = _Rotary(norm, 0, 0, eps, _at(self._keep[0]), _at(self._keep[1]), None, None)
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
        self._sinks = None if sinks is None else _floats(sinks)
        self._call = _Attention(
            None, None, None, None, None, None, None, width, key_dim, width, key_dim, width, value_dim, heads,
            TYPES[dtype], scaling, softcap or 0.0, window or 0, _at(self._sinks),
        )  # fmt: skip
        self._pointer = ctypes.addressof(self._call)

    def __call__(self, paged: Any, layer: int, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Attend for one layer of a step: [T, H V]. `paged` has `kernels`, `caches`, `steps`; cos and sin [1, T, W]."""
        out = torch.empty(qkv.shape[0], self._width, dtype=self._dtype)
        call, base, kernels = self._call, qkv.data_ptr(), paged.kernels
        call.c, call.s, call.r = paged.caches[layer].pointer, paged.steps.pointer, self._rotary.at(cos, sin)
        call.query, call.key, call.value, call.out = base, base + self._key, base + self._value, out.data_ptr()
        _ok(kernels.library.ps_attention(kernels.pool, self._pointer))
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
        query.shape[1], TYPES[query.dtype], scaling, softcap or 0.0, window or 0, _at(sinks),
    )  # fmt: skip
    _ok(kernels.library.ps_attention(kernels.pool, ctypes.addressof(call)))


def survey_logits(kernels: Kernels, logits: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of logits float32 [R, N * block]: each block's greatest [R, N]; sums of exp(logit - row's greatest), float64 [R].

    A row with a NaN has a NaN in both. `block` is a multiple of 16.
    """
    rows, width = logits.shape
    peaks, totals = torch.empty(rows, width // block), torch.empty(rows, dtype=torch.float64)
    call = _Survey(logits.data_ptr(), rows, width, block, peaks.data_ptr(), totals.data_ptr())
    kernels.library.ps_survey(kernels.pool, ctypes.byref(call))
    return peaks, totals


def pages(num_bytes: int) -> Tensor:
    """Zeroed bytes that cost nothing until they are touched, on huge pages where the system has them."""
    region = mmap.mmap(-1, max(1, num_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system may be built without them
            region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def _floats(x: Tensor) -> Tensor:
    return x.detach().float().contiguous().clone()


def _ok(enough: int) -> None:
    if not enough:
        raise MemoryError("no memory for the kernels' scratch: lower max_num_batched_tokens")


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

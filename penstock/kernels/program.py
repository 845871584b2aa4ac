"""`Program`: the kernels of one or many layers as one call, and what they attend with: `Attention`, `Rotary`.

Owns the list of operations; weights belong to the parts it was given, the memory between operations to the kernels.
Used by the fused layers of `optimizers`. Nothing of Python runs between the operations of a call.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.kernels.native import FLOATS, Int, Kernels, Long, Ptr, address, check, floats, operand, struct
from penstock.kernels.paged import MAX_HEAD, AttentionCall, CacheTable, Steps
from penstock.kernels.products import Linear, Norm

STREAM = 0  # the register of the residual stream
_LINEAR, _ADD_NORM, _ATTENTION = 0, 1, 2
_ALIGNMENT = 4096  # bytes

_Rotary = struct(
    "rotary", norm=Int, type=Int, width=Long, eps=ctypes.c_float, query_norm=Ptr, key_norm=Ptr, cos=Ptr, sin=Ptr
)
_Op = struct("op", kind=Int, source=Int, target=Int, unused=Int, what=Ptr)
_Program = struct(
    "program", ops=Ptr, count=Long, rows=Long, at=Ptr, caches=Ptr, s=Ptr, cos=Ptr, sin=Ptr, width=Long, type=Int
)


class Paged(Protocol):
    """What a program needs of a step."""

    @property
    def table(self) -> CacheTable: ...
    @property
    def steps(self) -> Steps: ...


class Rotary:
    """Norm of queries and keys (0 none, 1 per head, 2 over all heads), and whether positions rotate them."""

    def __init__(
        self, norm: int, eps: float, query_norm: Tensor | None, key_norm: Tensor | None, *, rotates: bool
    ) -> None:
        self._keep = [None if w is None else floats(w) for w in (query_norm, key_norm)]
        self._struct = _Rotary(norm, 0, int(rotates), eps, address(self._keep[0]), address(self._keep[1]), None, None)
        self.pointer = ctypes.addressof(self._struct)


class Attention:
    """How the layer at place `layer` attends over rows [T, (H D | K D | K V)] of its projection: [T, H V]."""

    def __init__(
        self, layer: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, *,
        scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None, rotary: Rotary,
    ) -> None:  # fmt: skip
        read = heads * key_dim + kv_heads * (key_dim + value_dim)
        self.k, self.width = read, heads * value_dim
        self.layer, self.dims = layer, (kv_heads, key_dim, value_dim)
        self._keep = rotary, None if sinks is None else floats(sinks)
        self._struct = AttentionCall(
            None, None, rotary.pointer, None, None, None, None, read, key_dim, read, key_dim, read, value_dim, heads,
            FLOATS[dtype], scaling, softcap or 0.0, window or 0, address(self._keep[1]), layer,
        )  # fmt: skip
        self.pointer = ctypes.addressof(self._struct)


class Program:
    """Operations over numbered registers, each holding rows of one width; `STREAM` is the caller's tensor."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._kernels = kernels
        self._dtype = dtype
        self._ops: list[tuple[int, int, int, Linear | Norm | Attention]] = []
        self._widths: dict[int, int] = {}
        self._call: Any = None
        self._table: CacheTable | None = None  # the last one, which fits

    def linear(self, linear: Linear, source: int, target: int) -> None:
        """target = linear(source), or added to target where that is its mode."""
        self._append(_LINEAR, source, target, linear)

    def add_norm(self, norm: Norm, source: int, target: int) -> None:
        """target += norm.scale * norm(source)."""
        self._append(_ADD_NORM, source, target, norm)

    def attention(self, attention: Attention, source: int, target: int) -> None:
        """target = attention(source)."""
        self._append(_ATTENTION, source, target, attention)

    def extend(self, other: Program) -> None:
        """Go on with all that `other` does."""
        if other._widths[STREAM] != self._widths[STREAM]:
            raise AssertionError("the layers' streams are of different widths")
        for register, width in other._widths.items():
            self._widths[register] = max(width, self._widths.get(register, 0))
        self._ops += other._ops
        self._call = self._table = None

    def run(self, x: Tensor, paged: Paged, cos: Tensor | None, sin: Tensor | None) -> None:
        """Run over the rows of x [T, N], the stream, in place.

        `paged` has the step's `steps` and the `table` of caches; cos and sin are [1, T, W], or None to rotate nothing.
        """
        rows, steps = len(x), paged.steps
        if paged.table is not self._table:
            self._fit(paged.table)
        call, registers = self._call or self._prepare()
        call.rows, registers[STREAM] = rows, operand(x, self._dtype, steps.tokens, self._widths[STREAM])
        self._place(registers, rows)
        call.caches, call.s = paged.table.pointer, steps.pointer
        call.width = 0
        if cos is not None and sin is not None:
            call.cos, call.sin = (operand(angles, cos.dtype, *cos.shape) for angles in (cos, sin))
            call.width, call.type = self._rotated(cos, rows), FLOATS[cos.dtype]
        check(self._kernels.library.ps_program(self._kernels.pool, ctypes.addressof(call)))

    def _rotated(self, cos: Tensor, rows: int) -> int:
        """How many numbers of a head these angles rotate."""
        width = cos.shape[-1]
        if cos.numel() != rows * width or width % 2 or width > self._narrowest:
            raise AssertionError(f"angles {tuple(cos.shape)} do not rotate {rows} heads of {self._narrowest} numbers")
        return width

    def _append(self, kind: int, source: int, target: int, what: Linear | Norm | Attention) -> None:
        """Within a layer all rows of a register have one width."""
        for register, width in ((source, what.k), (target, what.width)):
            if self._widths.setdefault(register, width) != width:
                raise AssertionError(f"rows of {self._widths[register]} numbers are taken for rows of {width}")
        self._ops.append((kind, source, target, what))
        self._call = self._table = None

    def _fit(self, table: CacheTable) -> None:
        """See that the caches are what the attentions take them for."""
        attentions = [what for _, _, _, what in self._ops if isinstance(what, Attention)]
        for attention in attentions:
            cache = table.caches[attention.layer]
            if attention.dims != (cache.heads, cache.key_dim, cache.value_dim):
                raise AssertionError(f"layer {attention.layer} does not store {attention.dims}")
        self._narrowest = min((attention.dims[1] for attention in attentions), default=MAX_HEAD)
        self._table = table

    def _prepare(self) -> tuple[Any, Any]:
        """The structures of a call; they keep each other alive."""
        ops = (_Op * len(self._ops))(*(_Op(kind, a, b, 0, what.pointer) for kind, a, b, what in self._ops))
        registers = (Ptr * (1 + max(self._widths)))()
        call = _Program(ctypes.addressof(ops), len(ops), 0, ctypes.addressof(registers))
        call.keep = ops
        self._call = call, registers
        return call, registers

    def _place(self, registers: Any, rows: int) -> None:
        """Find memory for every register but the stream."""
        sizes = {
            register: -(-rows * width * self._dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            for register, width in self._widths.items()
            if register != STREAM
        }
        base = self._kernels.workspace(sum(sizes.values()))
        for register, size in sizes.items():
            registers[register] = base
            base += size

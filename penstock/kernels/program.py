"""`Program`: the kernels of one or many layers as one call, and what they attend with: `Attention`, `Rotary`.

Owns the list of operations; weights belong to the parts it was given, the memory between operations to the kernels.
Used by the fused layers of `optimizers`. Nothing of Python runs between the operations of a call.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from penstock.kernels.native import TYPES, Int, Kernels, Long, Ptr, address, check, floats, struct
from penstock.kernels.paged import AttentionCall
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
        self.width = heads * value_dim
        self._keep = rotary, None if sinks is None else floats(sinks)
        self._struct = AttentionCall(
            None, None, rotary.pointer, None, None, None, None, read, key_dim, read, key_dim, read, value_dim, heads,
            TYPES[dtype], scaling, softcap or 0.0, window or 0, address(self._keep[1]), layer,
        )  # fmt: skip
        self.pointer = ctypes.addressof(self._struct)


class Program:
    """Operations over numbered registers, each holding rows of one width; `STREAM` is the caller's tensor."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._kernels = kernels
        self._itemsize = dtype.itemsize
        self._ops: list[tuple[int, int, int, Linear | Norm | Attention]] = []
        self._widths: dict[int, int] = {}
        self._call: Any = None

    def linear(self, linear: Linear, source: int, target: int) -> None:
        """target = linear(source), or added to target where that is its mode."""
        self._append(_LINEAR, source, target, linear, linear.width)

    def add_norm(self, norm: Norm, source: int, target: int) -> None:
        """target += norm.scale * norm(source)."""
        self._append(_ADD_NORM, source, target, norm, norm.width)

    def attention(self, attention: Attention, source: int, target: int) -> None:
        """target = attention(source)."""
        self._append(_ATTENTION, source, target, attention, attention.width)

    def extend(self, other: Program) -> None:
        """Go on with all that `other` does."""
        for register, width in other._widths.items():
            self._widths[register] = max(width, self._widths.get(register, 0))
        self._ops += other._ops
        self._call = None

    def run(self, x: Tensor, paged: Any, cos: Tensor | None, sin: Tensor | None) -> None:
        """Run over the rows of x [T, N], the stream, in place.

        `paged` has the step's `steps` and the `table` of caches; cos and sin are [1, T, W], or None to rotate nothing.
        """
        call, registers = self._call or self._prepare()
        call.rows, registers[STREAM] = len(x), x.data_ptr()
        self._place(registers, len(x))
        call.caches, call.s = paged.table, paged.steps.pointer
        call.width = 0
        if cos is not None and sin is not None:
            call.cos, call.sin, call.width, call.type = cos.data_ptr(), sin.data_ptr(), cos.shape[-1], TYPES[cos.dtype]
        check(self._kernels.library.ps_program(self._kernels.pool, ctypes.addressof(call)))

    def _append(self, kind: int, source: int, target: int, what: Linear | Norm | Attention, width: int) -> None:
        self._ops.append((kind, source, target, what))
        self._widths[target] = max(width, self._widths.get(target, 0))
        self._call = None

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
            register: -(-rows * width * self._itemsize // _ALIGNMENT) * _ALIGNMENT
            for register, width in self._widths.items()
            if register != STREAM
        }
        base = self._kernels.workspace(sum(sizes.values()))
        for register, size in sizes.items():
            registers[register] = base
            base += size

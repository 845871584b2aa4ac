"""`Program`: the kernels of one or several layers as one call, and their attention: `Attention`, `Rotary`.

Owns the list of operations; weights belong to the parts it was given, the memory between operations to the kernels.
Used by the fused layers of `optimizers`. No Python runs between the operations of a call.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels.native import FLOATS, Kernels, address, check, floats, operand, write_floats
from penstock.kernels.paged import MAX_HEAD, AttentionMetadata, AttentionOptions, CacheTable
from penstock.kernels.products import Linear, Norm
from penstock.kernels.structures import AttentionStruct, OperationStruct, ProgramStruct, Ptr, RotaryStruct

STREAM = 0  # the register of the residual stream
_LINEAR, _ADD_NORM, _ATTENTION = 0, 1, 2
_ALIGNMENT = 4096  # bytes


class Paged(Protocol):
    """What a program needs of a step."""

    @property
    def table(self) -> CacheTable: ...
    @property
    def metadata(self) -> AttentionMetadata: ...


class Rotary:
    """Norm of queries and keys (0 none, 1 per head, 2 over all heads), and whether rotary positions follow."""

    def __init__(
        self, norm: int, eps: float, query_norm: Tensor | None, key_norm: Tensor | None, *, rotates: bool
    ) -> None:
        self._weights = [None if w is None else floats(w) for w in (query_norm, key_norm)]
        self._struct = RotaryStruct(norm, 0, int(rotates), eps, *map(address, self._weights), None, None)
        self.pointer = ctypes.addressof(self._struct)

    def write(self, query_norm: Tensor | None, key_norm: Tensor | None) -> None:
        """Replace the weights of the norms in place; None keeps what is there."""
        write_floats(*zip(self._weights, (query_norm, key_norm), strict=True))


@dataclass(frozen=True, slots=True)
class HeadGeometry:
    """Numbers of query heads and K/V heads, and the sizes of keys (and queries) and values."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


class Attention:
    """Attention of layer `layer` over rows [T, (H D | K D | K V)] of its projection: [T, H V]."""

    def __init__(
        self, layer: int, geometry: HeadGeometry, options: AttentionOptions, rotary: Rotary, dtype: torch.dtype
    ) -> None:
        self.layer, self.geometry = layer, geometry
        heads, key_dim, value_dim = geometry.heads, geometry.key_dim, geometry.value_dim
        row = heads * key_dim + geometry.kv_heads * (key_dim + value_dim)
        self.k, self.width = row, heads * value_dim
        self._rotary, self._sinks = rotary, None if options.sinks is None else floats(options.sinks)
        self._struct = AttentionStruct(
            rotary=rotary.pointer, query_token=row, query_head=key_dim, key_token=row, key_head=key_dim,
            value_token=row, value_head=value_dim, heads=heads, type=FLOATS[dtype], scaling=options.scaling,
            softcap=options.softcap or 0.0, window=options.window or 0, sinks=address(self._sinks), layer=layer,
        )  # fmt: skip
        self.pointer = ctypes.addressof(self._struct)

    def write(self, sinks: Tensor | None) -> None:
        """Replace the sink logits [H] in place; None keeps what is there."""
        write_floats((self._sinks, sinks))


Operation = Linear | Norm | Attention


@dataclass(frozen=True, slots=True)
class _Call:
    """The structures of a call. They hold addresses of each other, so they live together."""

    program: ProgramStruct
    operations: ctypes.Array[OperationStruct]
    registers: ctypes.Array[ctypes.c_void_p]


class Program:
    """Operations over numbered registers that hold rows of one width each; `STREAM` is the caller's tensor."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._kernels = kernels
        self._dtype = dtype
        self._operations: list[tuple[int, int, int, Operation]] = []
        self._widths: dict[int, int] = {}
        self._call: _Call | None = None
        self._table: CacheTable | None = None  # the latest one that was checked
        self._min_key_dim = MAX_HEAD

    def linear(self, linear: Linear, source: int, target: int) -> None:
        """target = linear(source), or target += linear(source) if its mode is ADD."""
        self._append(_LINEAR, source, target, linear)

    def add_norm(self, norm: Norm, source: int, target: int) -> None:
        """target += norm.scale * norm(source)."""
        self._append(_ADD_NORM, source, target, norm)

    def attention(self, attention: Attention, source: int, target: int) -> None:
        """target = attention(source)."""
        self._append(_ATTENTION, source, target, attention)

    def extend(self, other: Program) -> None:
        """Append the operations of `other`."""
        if other._widths[STREAM] != self._widths[STREAM]:
            raise AssertionError("the layers' streams are of different widths")
        for register, width in other._widths.items():
            self._widths[register] = max(width, self._widths.get(register, 0))
        self._operations += other._operations
        self._call = self._table = None

    def run(self, x: Tensor, paged: Paged, cos: Tensor | None, sin: Tensor | None) -> None:
        """Run over the rows of x [T, N], the stream, in place.

        `paged` has the step's `metadata` and the `table` of caches; cos and sin are [1, T, W], or None for no rotary
        positions.
        """
        rows, metadata = len(x), paged.metadata
        if paged.table is not self._table:
            self._check_caches(paged.table)
        call = self._call or self._prepare()
        program, registers = call.program, call.registers
        program.rows, registers[STREAM] = rows, operand(x, self._dtype, metadata.tokens, self._widths[STREAM])
        self._allocate(registers, rows)
        program.caches, program.metadata = paged.table.pointer, metadata.pointer
        program.width, program.slots = 0, self._kernels.adapter_slots(rows)
        if cos is not None and sin is not None:
            program.cos, program.sin = (operand(angles, cos.dtype, *cos.shape) for angles in (cos, sin))
            program.width, program.type = self._rotated_width(cos, rows), FLOATS[cos.dtype]
        check(self._kernels.library.ps_program(self._kernels.pool, ctypes.addressof(program)))

    def _rotated_width(self, cos: Tensor, rows: int) -> int:
        """How many numbers of a head these angles rotate."""
        width = cos.shape[-1]
        if cos.numel() != rows * width or width % 2 or width > self._min_key_dim:
            raise AssertionError(f"angles {tuple(cos.shape)} do not rotate {rows} heads of {self._min_key_dim} numbers")
        return width

    def _append(self, kind: int, source: int, target: int, operation: Operation) -> None:
        """Within a layer all rows of a register have one width."""
        for register, width in ((source, operation.k), (target, operation.width)):
            if self._widths.setdefault(register, width) != width:
                raise AssertionError(f"rows of {self._widths[register]} numbers are taken for rows of {width}")
        self._operations.append((kind, source, target, operation))
        self._call = self._table = None

    def _check_caches(self, table: CacheTable) -> None:
        """Check that each attention's cache has the heads that it assumes."""
        attentions = [operation for *_, operation in self._operations if isinstance(operation, Attention)]
        for attention in attentions:
            cache, geometry = table.caches[attention.layer], attention.geometry
            dims = (geometry.kv_heads, geometry.key_dim, geometry.value_dim)
            if dims != (cache.heads, cache.key_dim, cache.value_dim):
                raise AssertionError(f"layer {attention.layer} does not store {dims}")
        self._min_key_dim = min((attention.geometry.key_dim for attention in attentions), default=MAX_HEAD)
        self._table = table

    def _prepare(self) -> _Call:
        """Make the structures of a call; later calls reuse them."""
        operations = (OperationStruct * len(self._operations))(
            *(OperationStruct(kind, source, target, 0, op.pointer) for kind, source, target, op in self._operations)
        )
        registers = (Ptr * (1 + max(self._widths)))()
        program = ProgramStruct(ctypes.addressof(operations), len(operations), 0, ctypes.addressof(registers))
        self._call = _Call(program, operations, registers)
        return self._call

    def _allocate(self, registers: ctypes.Array[ctypes.c_void_p], rows: int) -> None:
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

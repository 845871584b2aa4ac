"""Adapters of linear layers over the compiled kernels: `AdapterSlots` of a layer, `PackedAdapter`, and `LowRankSum`.

Owns the packed copies of adapters' matrices; a layer has one adapter in each slot, or none. Used by the adapters of
`models`. The layout of packed matrices is documented in `cpu/low_rank.c`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.native import FLOATS, TYPES, Kernels, check, operand, pages, strided
from penstock.kernels.structures import LinearStruct, LowRankLayerStruct, LowRankPartStruct, LowRankStruct, Ptr

_ADD = 1  # the mode of a `LinearStruct`


@dataclass(frozen=True, slots=True)
class LowRankPart:
    """scaling * b a x for the outputs of a layer from `first` on: a [r, K] and b [N, r] of any floating dtype."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float
    first: int = 0


class NotFiniteError(ValueError):
    """`part` holds a number that is not finite in the dtype of its layer."""

    def __init__(self, part: LowRankPart) -> None:
        super().__init__(part.name)
        self.part = part


@dataclass(frozen=True, slots=True)
class LowRank:
    """One adapter at one layer, packed; `memory` is what `struct` points into."""

    struct: LowRankStruct
    memory: Tensor


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter: what it has for the slots of each layer, all in `memory`."""

    low_ranks: Sequence[tuple[AdapterSlots, LowRank]]
    memory: Tensor

    def put(self, slot: int) -> None:
        """Have rows of this slot run with the adapter. Called between steps."""
        for slots, low_rank in self.low_ranks:
            slots.put(slot, low_rank)

    def remove(self, slot: int) -> None:
        """Have rows of this slot run without it. Called between steps."""
        for slots, _ in self.low_ranks:
            slots.put(slot, None)


class AdapterSlots:
    """The adapters of the linear layer of `layer`, by slot, in the dtype of its inputs; `is_head`: it is the head."""

    def __init__(self, kernels: Kernels, layer: LinearStruct) -> None:
        self.library, self.layer = kernels.library, layer
        self.is_head = False
        self._kernels = kernels
        self.low_ranks: list[LowRank | None] = []
        self._table = (Ptr * 0)()

    @property
    def is_used(self) -> bool:
        """Whether any slot has an adapter."""
        return self.layer.adapters is not None

    def of_rows(self, rows: int) -> int | None:
        """The address of the slots that so many rows of the layer have in this step; None if there are none."""
        return self._kernels.adapter_slots(rows, is_head=self.is_head) if self.is_used else None

    def put(self, slot: int, low_rank: LowRank | None) -> None:
        """Have rows of this slot run with an adapter, or with none. Called between steps."""
        self.low_ranks += [None] * (slot + 1 - len(self.low_ranks))
        self.low_ranks[slot] = low_rank
        if len(self._table) < len(self.low_ranks):
            self._table = (Ptr * (2 * len(self.low_ranks)))(*self._table)
        self._table[slot] = None if low_rank is None else ctypes.addressof(low_rank.struct)
        ranks = [low_rank.struct.rank for low_rank in self.low_ranks if low_rank is not None]
        self.layer.max_rank, self.layer.num_slots = max(ranks, default=0), len(self._table)
        self.layer.adapters = ctypes.addressof(self._table) if ranks else None


def pack_adapter(
    layers: Sequence[tuple[AdapterSlots, Sequence[LowRankPart]]], spare: Tensor | None = None
) -> PackedAdapter:
    """Copies of the matrices of one adapter, for each layer in the order of its outputs. Any thread.

    They are in the memory of an adapter that is used no more, if `spare` is that and is large enough: fresh pages take
    longer than packing. Raises `NotFiniteError`.
    """
    arrays = [(LowRankPartStruct * len(parts))(*map(_part_struct, parts)) for _, parts in layers]
    structs = [LowRankStruct() for _ in layers]
    calls = (LowRankLayerStruct * len(layers))(
        *(
            LowRankLayerStruct(
                ctypes.addressof(slots.layer), ctypes.addressof(array), ctypes.addressof(struct), len(array)
            )
            for (slots, _), array, struct in zip(layers, arrays, structs, strict=True)
        )
    )
    library = layers[0][0].library
    size = library.ps_low_rank_bytes(calls, len(calls))
    memory = pages(size) if spare is None or len(spare) < size else spare
    library.ps_pack_low_ranks(calls, len(calls), memory.data_ptr())
    for call, (_, parts) in zip(calls, layers, strict=True):
        if call.broken < len(parts):
            raise NotFiniteError(parts[call.broken])
    low_ranks = [(slots, LowRank(struct, memory)) for (slots, _), struct in zip(layers, structs, strict=True)]
    return PackedAdapter(low_ranks, memory)


class LowRankSum:
    """Adds what adapters add to the outputs of a layer [N, K] whose own product is computed elsewhere."""

    def __init__(self, kernels: Kernels, n: int, k: int, dtype: torch.dtype) -> None:
        self.n, self.k, self.dtype = n, k, dtype
        self._kernels, self._run = kernels, kernels.library.ps_low_rank
        kind = TYPES[dtype]
        self._struct = LinearStruct(n=n, k=k, format=kind, mode=_ADD, in_type=kind, out_type=kind, scale=1.0)
        self._layer = ctypes.addressof(self._struct)
        self.adapters = AdapterSlots(kernels, self._struct)

    def add(self, x: Tensor, y: Tensor) -> None:
        """y [..., N] += what the adapter of each row of x [..., K] adds, in place; both contiguous and of `dtype`."""
        *places, k = x.shape
        rows = x.numel() // k
        slots = self.adapters.of_rows(rows)
        if slots is None:
            return
        source, target = operand(x, self.dtype, *places, self.k), operand(y, self.dtype, *places, self.n)
        check(self._run(self._kernels.pool, self._layer, source, rows, k, target, self.n, slots))


def _part_struct(part: LowRankPart) -> LowRankPartStruct:
    (rank, k), size = part.a.shape, len(part.b)
    addresses = strided(part.a, part.a.dtype, rank, k), strided(part.b, part.b.dtype, size, rank)
    strides = (matrix.stride(0) * matrix.element_size() for matrix in (part.a, part.b))
    types = FLOATS[part.a.dtype], FLOATS[part.b.dtype]
    return LowRankPartStruct(*addresses, *strides, rank, part.first, size, *types, part.scaling)

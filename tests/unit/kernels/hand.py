"""What the kernels should compute, in plain torch, and sequences in a cache of panels to compute it on."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from penstock.kernels.native import Kernels
from penstock.kernels.paged import PANEL, AttentionMetadata, PanelCache, attend
from penstock.models.layout import StepLayout
from penstock.models.panels import metadata_of
from penstock.sampling import SamplingParams
from penstock.step import Row

# What one rounding costs at most, relative to the number: half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

Part = tuple[int, int, int]  # sequence, begin, end


BLOCK = 256  # numbers that int8 quantization rotates and scales together


def rotation(n: int) -> Tensor:
    """The orthogonal matrix Q [n, n] that rows are multiplied by before they are quantized, in float64."""
    span = min(BLOCK, 1 << (n.bit_length() - 1))
    matrix = torch.eye(n, dtype=torch.float64)
    for begin in [*range(0, n - span + 1, span), *([n - span] if n % span else [])]:
        matrix[:, begin : begin + span] = matrix[:, begin : begin + span] @ torch.diag(_signs(span)) @ _hadamard(span)
    return matrix


def rotated(x: Tensor) -> Tensor:
    """Rows [M, K] with every block rotated, in float64."""
    return torch.cat([block.double() @ rotation(block.shape[1]) for block in x.split(BLOCK, 1)], 1)


def _hadamard(n: int) -> Tensor:
    """Walsh's matrix by Sylvester's construction, scaled to be orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / n**0.5


def _signs(n: int) -> Tensor:
    pairs = [bin(place & place >> 1 & 0x55555555).count("1") for place in range(n)]
    return torch.tensor([(-1.0) ** count for count in pairs], dtype=torch.float64)


def attention_by_hand(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries [T, H, D] are the last T positions of the context, keys and values [L, K, D]; in float64: [T, H, V]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("thd,lhd->htl", query.double(), keys) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(len(keys))
    position = place[len(keys) - len(query) :, None]
    visible = (place <= position) & (place > position - (window or len(keys) + 1))
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(query), 1)], -1)
    weights = scores.softmax(-1)[..., : len(keys)]
    return torch.einsum("htl,lhd->thd", weights, values)


@dataclass
class Sequences:
    """Sequences of random queries, keys and values, in a cache whose blocks were handed out at random.

    The first `shared` tokens of all sequences are the same, in the same blocks.
    """

    kernels: Kernels
    lengths: Sequence[int]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 0
    dtype: torch.dtype = torch.float32
    store: torch.dtype | None = None
    block_size: int = 16
    shared: int = 0
    seed: int = 0
    cache: PanelCache = field(init=False)
    query: list[Tensor] = field(init=False)
    key: list[Tensor] = field(init=False)
    value: list[Tensor] = field(init=False)
    blocks: list[array[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.value_dim = self.value_dim or self.dim
        counts = [-(-length // self.block_size) for length in self.lengths]
        order = list(range(sum(counts) + 5))
        random.Random(self.seed).shuffle(order)
        self.blocks = [array("i", [order.pop() for _ in range(count)]) for count in counts]
        panels = -(-(sum(counts) + 5) * self.block_size // PANEL)
        self.cache = PanelCache(
            self.kernels, panels, self.kv_heads, self.dim, self.value_dim, self.store or self.dtype, self.dtype
        )
        self.query = self._random(self.heads, self.dim)
        self.key = self._random(self.kv_heads, self.dim)
        self.value = self._random(self.kv_heads, self.value_dim)
        for mine in range(1, len(self.lengths)):
            self.blocks[mine][: self.shared // self.block_size] = self.blocks[0][: self.shared // self.block_size]
            for x in (self.key, self.value):
                x[mine][: self.shared] = x[0][: self.shared]

    def _random(self, heads: int, dim: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + dim + heads)
        return [torch.randn(n, heads, dim, generator=generator).to(self.dtype) for n in self.lengths]

    def slots(self, which: int) -> Tensor:
        """The cache slots of a sequence's tokens."""
        places = range(self.lengths[which])
        return torch.tensor(
            [self.blocks[which][p // self.block_size] * self.block_size + p % self.block_size for p in places]
        )

    def metadata(self, parts: Sequence[Part]) -> AttentionMetadata:
        """The index arrays of one step."""
        rows = [
            Row(which, [0] * end, begin, end, self.blocks[which], True, SamplingParams(), end)
            for which, begin, end in parts
        ]
        slots = StepLayout.of(tuple(rows), self.block_size, torch.device("cpu")).write_slots.numpy()
        return metadata_of(rows, self.block_size, slots)

    def attend(
        self, *parts: Part, kernels: Kernels | None = None, scaling: float = 0.3, **options: Any
    ) -> list[Tensor]:
        """One step in which these tokens go through attention together: [T, H, V] of each part."""
        query, key, value = (
            torch.cat([x[which][begin:end] for which, begin, end in parts]) for x in (self.query, self.key, self.value)
        )
        out = torch.empty(len(query), self.heads, self.value_dim, dtype=self.dtype)
        attend(
            kernels or self.kernels,
            self.cache,
            self.metadata(parts),
            query,
            key,
            value,
            out,
            scaling=scaling,
            **options,
        )
        return list(out.split([end - begin for _, begin, end in parts]))

    def fill(self) -> None:
        """Let every token's key and value be in the cache."""
        self.attend(*((which, 0, length) for which, length in enumerate(self.lengths)))

    def by_hand(self, part: Part, scaling: float = 0.3, **options: Any) -> Tensor:
        """What `attend` should give for one part."""
        which, begin, end = part
        keys, values = self.key[which][:end], self.value[which][:end]
        return attention_by_hand(self.query[which][begin:end], keys, values, scaling=scaling, **options)

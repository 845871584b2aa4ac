"""Attention over a fused projection: norms and rotary positions are those by hand, the bits always the same."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from penstock.kernels.native import Kernels
from penstock.kernels.paged import AttentionOptions, CacheTable
from penstock.kernels.program import STREAM, Attention, HeadGeometry, Program, Rotary
from tests.unit.kernels.hand import ROUNDING, Sequences, attention_by_hand

HEADS, KV_HEADS, DIM, VALUE_DIM, LENGTH = 6, 2, 24, 20, 90
EPS, SCALING = 1e-5, 0.3
NO_NORM, PER_HEAD, OVER_ALL = 0, 1, 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights_of(norm: int, largest: float, dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the norms of queries and keys; `largest` is the keys' greatest."""
    if norm == NO_NORM:
        return None, None
    sizes = (dim, dim) if norm == PER_HEAD else (HEADS * dim, KV_HEADS * dim)
    return torch.linspace(0.5, 2, sizes[0]), torch.linspace(largest, 0.1, sizes[1])


def angles(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [LENGTH, width] of rotary positions; both halves are the same."""
    frequency = torch.linspace(1, 0.01, width // 2).repeat(2)
    angle = torch.arange(LENGTH)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def finished(x: Tensor, norm: int, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [T, H, D] as they should enter attention, in float64."""
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    if weight is not None:
        flat = x if norm == PER_HEAD else x.flatten(1)
        flat = flat * (flat.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        x = flat.view(x.shape)
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


class World:
    """One sequence as rows of a fused projection, and attention over them."""

    def __init__(
        self, kernels: Kernels, dtype: torch.dtype, norm: int, width: int, largest: float = 2, dim: int = DIM
    ) -> None:
        self.held = Sequences(kernels, (LENGTH,), HEADS, KV_HEADS, dim, VALUE_DIM, dtype)
        self.qkv = torch.cat([x[0].flatten(1) for x in (self.held.query, self.held.key, self.held.value)], 1)
        self.cos, self.sin = angles(width, dtype)
        self.weights = weights_of(norm, largest, dim)
        geometry = HeadGeometry(HEADS, KV_HEADS, dim, VALUE_DIM)
        rotary = Rotary(norm, EPS, *self.weights, rotates=True)
        self.attention = Attention(0, geometry, AttentionOptions(SCALING), rotary, dtype)
        self.program = Program(kernels, dtype)
        self.program.attention(self.attention, STREAM, STREAM + 1)

    def attend(self, begin: int, end: int, rotates: bool = True) -> Tensor:
        """Tokens [begin, end) as one step: [T, H V]."""
        paged = SimpleNamespace(table=CacheTable([self.held.cache]), metadata=self.held.metadata([(0, begin, end)]))
        cos, sin = (x[None, begin:end].contiguous() if rotates else None for x in (self.cos, self.sin))
        self.program.run(self.qkv[begin:end].clone(), paged, cos, sin)
        shape = (end - begin, HEADS * VALUE_DIM)
        kernels = self.held.kernels
        memory = (ctypes.c_char * (prod(shape) * self.qkv.itemsize)).from_address(kernels.workspace(0))
        return torch.frombuffer(memory, dtype=self.qkv.dtype).clone().view(shape)


@pytest.mark.parametrize("width", [DIM, 8])
@pytest.mark.parametrize("norm", [NO_NORM, PER_HEAD, OVER_ALL])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_rotary_positions_are_those_by_hand(
    kernels: Kernels, dtype: torch.dtype, norm: int, width: int
) -> None:
    world = World(kernels, dtype, norm, width)
    query, key = (
        finished(x[0], norm, weight, world.cos, world.sin)
        for x, weight in zip((world.held.query, world.held.key), world.weights, strict=True)
    )
    wanted = attention_by_hand(query, key, world.held.value[0], scaling=SCALING)
    found = world.attend(0, LENGTH)
    stored, values = world.held.cache.read(world.held.slots(0))
    roundings = 3 * ROUNDING[dtype]  # of the norm over all heads, of the rotated number, of the product's operands
    torch.testing.assert_close(stored.double(), key, rtol=roundings, atol=roundings * 3 + 1e-6)
    assert torch.equal(values, world.held.value[0].float())
    torch.testing.assert_close(found.view(wanted.shape).double(), wanted, rtol=0, atol=60 * ROUNDING[dtype] + 1e-5)


@pytest.mark.parametrize("norm", [NO_NORM, PER_HEAD, OVER_ALL])
def test_without_positions_nothing_is_rotated(kernels: Kernels, norm: int) -> None:
    world = World(kernels, torch.float32, norm, DIM)
    still, none = torch.ones(LENGTH, DIM), torch.zeros(LENGTH, DIM)
    query, key = (
        finished(x[0], norm, weight, still, none)
        for x, weight in zip((world.held.query, world.held.key), world.weights, strict=True)
    )
    wanted = attention_by_hand(query, key, world.held.value[0], scaling=SCALING).float().flatten(1)
    torch.testing.assert_close(world.attend(0, LENGTH, rotates=False), wanted, rtol=0, atol=1e-5)


def in_chunks(world: World) -> Tensor:
    """All tokens, of few and many at a time."""
    ends = (0, 1, 2, 5, 6, 30, 45, 46, LENGTH)
    return torch.cat([world.attend(begin, end) for begin, end in pairwise(ends)])


@pytest.mark.parametrize("width", [DIM, 8])
@pytest.mark.parametrize("norm", [NO_NORM, PER_HEAD, OVER_ALL])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_gets_the_same_bits_alone_and_in_a_prompt(
    kernels: Kernels, dtype: torch.dtype, norm: int, width: int
) -> None:
    """Few tokens are prepared head by head, many token by token."""
    whole, chunked = World(kernels, dtype, norm, width), World(kernels, dtype, norm, width)
    wanted = whole.attend(0, LENGTH)
    assert torch.equal(in_chunks(chunked), wanted)


@pytest.mark.parametrize("norm", [NO_NORM, PER_HEAD, OVER_ALL])
@pytest.mark.parametrize("dim", [64, 128])
def test_heads_of_common_sizes_get_the_same_bits_alone_and_in_a_prompt(kernels: Kernels, dim: int, norm: int) -> None:
    """In bfloat16 these are rotated in registers, by other code than heads of other sizes."""
    whole, chunked = (World(kernels, torch.bfloat16, norm, dim, dim=dim) for _ in range(2))
    wanted = whole.attend(0, LENGTH)
    assert torch.equal(in_chunks(chunked), wanted)
    keys = [world.held.cache.read(world.held.slots(0))[0] for world in (whole, chunked)]
    assert torch.equal(*keys)


@pytest.mark.parametrize("norm", [PER_HEAD, OVER_ALL])
def test_keys_that_overflow_their_format_are_broken(kernels: Kernels, norm: int) -> None:
    """In float16 they were stored as infinities, which half of the queries take for keys that count for nothing."""
    world = World(kernels, torch.float16, norm, DIM, largest=3e7)
    found = world.attend(0, LENGTH).view(LENGTH, HEADS, VALUE_DIM)
    assert not found.isfinite().any()

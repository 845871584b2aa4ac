"""Adapters of products, held against matrix products by hand: each row with its own adapter, or with none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.kernels.low_rank import LowRankPart, LowRankSum, NotFiniteError, pack_adapter
from penstock.kernels.native import Kernels
from penstock.kernels.products import ADD, GATED, RMS, STORE, Epilogue, Linear, Norm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Ranks of the matrices of one layer for each adapter; 0 is a matrix that the adapter does not change.
RANKS = ((3, 5, 4), (16, 0, 8), (0, 20, 1))
SHAPES = {  # inputs, outputs of each matrix, mode
    "three matrices": (40, (50, 30, 20), STORE),
    "several vectors": (300, (256,), STORE),
    "gated": (64, (70, 70), GATED),
    "added": (33, (64,), ADD),
}


def part(first: int, size: int, k: int, rank: int, dtype: torch.dtype) -> LowRankPart:
    a, b = torch.randn(rank, k), torch.randn(size, rank) * 0.2
    return LowRankPart(f"matrix at {first}", a.to(dtype), b.to(dtype), 0.5, first)


def low_rank(x: Tensor, parts: Sequence[LowRankPart], n: int) -> Tensor:
    """What an adapter adds to a layer's n outputs for one row of inputs, by hand."""
    added = torch.zeros(n)
    for own in parts:
        added[own.first : own.first + len(own.b)] += own.scaling * (own.b.float() @ (own.a.float() @ x))
    return added


def slots_of(rows: int, block: int) -> np.ndarray:
    """Slots 2, -1, 0 and 1 in turns, `block` rows of each."""
    return np.array([(i // block + 3) % 4 - 1 for i in range(rows)], dtype=np.int32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_of_a_product_gets_what_its_own_adapter_adds(kernels: Kernels, dtype: torch.dtype, shape: str) -> None:
    torch.manual_seed(0)
    k, sizes, mode = SHAPES[shape]
    weights = [(torch.randn(size, k) / k**0.5).to(dtype) for size in sizes]
    norm = None if mode == ADD else Norm(kernels, RMS, torch.ones(k), None, 1e-6, dtype)
    linear = Linear(kernels, weights, [None] * len(sizes), norm=norm, epilogue=Epilogue(mode, scale=0.7))
    adapters = []
    for slot, ranks in enumerate(RANKS):
        places = zip(linear.firsts(), sizes, ranks, strict=False)
        parts = [part(first, size, k, rank, dtype) for first, size, rank in places if rank]
        adapters.append(parts)
        if parts:
            pack_adapter([(linear.adapters, parts)]).put(slot)
    for rows, block in ((1, 1), (7, 1), (31, 5)):
        slots, x = slots_of(rows, block), torch.randn(rows, k).to(dtype)
        before = torch.randn(rows, linear.width).to(dtype)
        kernels.select_adapters(slots, slots)
        actual = linear(x, before.clone())
        normed = x.float() if norm is None else x.float() * torch.rsqrt(x.float().square().mean(-1, True) + 1e-6)
        sums = normed @ torch.cat(weights).float().T
        for i in np.flatnonzero(slots >= 0):
            sums[i] += low_rank(normed[i], adapters[slots[i]], sum(sizes))
        expected = sums[:, : sizes[0]] * sums[:, sizes[0] :] if mode == GATED else sums
        expected = before.float() + 0.7 * sums if mode == ADD else expected
        assert (actual.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        kernels.select_adapters(None)
        plain = linear(x, before.clone())
        assert torch.equal(actual[slots < 0], plain[slots < 0])
        last = slots[-1:].copy()
        kernels.select_adapters(last, last)
        assert torch.equal(actual[-1:], linear(x[-1:], before[-1:].clone()))
    kernels.select_adapters(None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_quantized_products_add_adapters_that_are_not_quantized(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = Linear(kernels, [torch.randn(48, 64).to(dtype)], [None], quantize=True)
    own = part(0, 48, 64, 8, dtype)
    pack_adapter([(linear.adapters, [own])]).put(0)
    x, slots = torch.randn(5, 64).to(dtype), np.zeros(5, dtype=np.int32)
    plain = linear(x).float()
    kernels.select_adapters(slots, slots)
    added = linear(x).float() - plain
    kernels.select_adapters(None)
    expected = torch.stack([low_rank(row, [own], 48) for row in x.float()])
    assert (added - expected).abs().max() <= 2 * TOLERANCE[dtype] * plain.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_sum_adds_to_outputs_that_were_computed_elsewhere(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, own = LowRankSum(kernels, 70, 40, dtype), part(0, 70, 40, 5, dtype)
    pack_adapter([(layer.adapters, [own])]).put(1)
    for rows in (1, 30):
        x, y = torch.randn(rows, 40).to(dtype), torch.randn(rows, 70).to(dtype)
        slots = np.array([1 if i % 3 == 0 else -1 for i in range(rows)], dtype=np.int32)
        actual = y.clone()
        kernels.select_adapters(slots, slots)
        layer.add(x, actual)
        expected = y.float()
        for i in np.flatnonzero(slots == 1):
            expected[i] += low_rank(x[i].float(), [own], 70)
        assert torch.equal(actual[slots < 0], y[slots < 0])
        torch.testing.assert_close(actual.float(), expected, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    kernels.select_adapters(None)
    layer.add(x, actual)


def test_a_sum_has_the_same_bits_on_one_thread_and_on_two(kernels: Kernels) -> None:
    torch.manual_seed(0)
    several, own = Kernels(2, kernels.library), part(0, 256, 256, 16, torch.float32)
    for rows in (8, 400):  # one thread computes a small sum alone
        slots, x, sums = np.zeros(rows, dtype=np.int32), torch.randn(rows, 256), []
        for pool in (kernels, several):
            layer, y = LowRankSum(pool, 256, 256, torch.float32), torch.zeros(rows, 256)
            pack_adapter([(layer.adapters, [own])]).put(0)
            pool.select_adapters(slots, slots)
            layer.add(x, y)
            pool.select_adapters(None)
            sums.append(y)
        assert sums[0].any()
        assert torch.equal(*sums)
    several.close()


def test_an_adapter_that_was_taken_out_adds_nothing(kernels: Kernels) -> None:
    linear, own = Linear(kernels, [torch.randn(16, 16)], [None]), part(0, 16, 16, 2, torch.float32)
    x, slots = torch.randn(2, 16), np.zeros(2, dtype=np.int32)
    plain, packed = linear(x), pack_adapter([(linear.adapters, [own])])
    kernels.select_adapters(slots, slots)
    packed.put(0)
    assert not torch.equal(linear(x), plain)
    packed.remove(0)
    assert torch.equal(linear(x), plain)
    kernels.select_adapters(None)


def test_an_adapter_that_does_not_change_a_layer_adds_nothing_there_whatever_its_slot(kernels: Kernels) -> None:
    """The kernel read the table of a layer's adapters beyond its end for adapters of higher slots."""
    linear, own = Linear(kernels, [torch.randn(16, 16)], [None]), part(0, 16, 16, 2, torch.float32)
    x, slots = torch.randn(2, 16), np.array([0, 100_000_000], dtype=np.int32)
    plain = linear(x)
    pack_adapter([(linear.adapters, [own])]).put(0)
    kernels.select_adapters(slots, slots)
    actual = linear(x)
    kernels.select_adapters(None)
    assert not torch.equal(actual[0], plain[0])
    assert torch.equal(actual[1], plain[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_finite_in_the_layer_s_dtype_are_refused_by_their_matrix(
    kernels: Kernels, value: float
) -> None:
    linear = Linear(kernels, [torch.randn(20, 16).half()] * 2, [None, None])
    good, bad = part(0, 20, 16, 3, torch.float32), part(20, 20, 16, 2, torch.float32)
    bad.b[7, 1] = value
    with pytest.raises(NotFiniteError, match="matrix at 20"):
        pack_adapter([(linear.adapters, [good, bad])])


def test_memory_of_an_adapter_that_is_used_no_more_is_taken_if_it_is_large_enough(kernels: Kernels) -> None:
    linear = Linear(kernels, [torch.randn(32, 32)], [None])
    large, small = (part(0, 32, 32, rank, torch.float32) for rank in (40, 4))
    memory = pack_adapter([(linear.adapters, [large])]).memory
    assert pack_adapter([(linear.adapters, [small])], memory).memory is memory
    assert pack_adapter([(linear.adapters, [large])], memory[:64]).memory is not memory


def test_a_layer_that_runs_on_other_rows_than_the_step_has_is_refused(kernels: Kernels) -> None:
    linear, own = Linear(kernels, [torch.randn(16, 16)], [None]), part(0, 16, 16, 2, torch.float32)
    pack_adapter([(linear.adapters, [own])]).put(0)
    kernels.select_adapters(np.zeros(3, dtype=np.int32), np.zeros(1, dtype=np.int32))
    with pytest.raises(AssertionError, match="2 rows of 3"):
        linear(torch.randn(2, 16))
    linear.adapters.is_head = True
    linear(torch.randn(1, 16))
    kernels.select_adapters(None)

"""Uniforms depend on their key alone, and cumulative sums are inverted without ever landing on a zero."""

from __future__ import annotations

import random

import pytest
import torch
from scipy import stats

from penstock.models.randomness import draw_from_candidates, draw_from_chunks, locate, uniform


def test_a_uniform_is_a_function_of_its_key() -> None:
    """The values are frozen: changing them changes what every stored seed means."""
    assert uniform(0, 0, 0) == uniform(0, 0, 0)
    values = [uniform(7, 0, 1), uniform(7, 1, 0), uniform(8, 0, 1)]
    assert values == [0.043480552168544295, 0.9414384674458415, 0.844967308850535]


def test_every_part_of_the_key_counts() -> None:
    keys = [(seed, index, position) for seed in range(10) for index in range(10) for position in range(100)]
    assert len({uniform(*key) for key in keys}) == len(keys)


def test_seeds_of_any_size_and_sign_differ() -> None:
    seeds = [0, 1, -1, 2**63, 2**64, 2**64 + 1, -(2**70)]
    assert len({uniform(seed, 0, 0) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("along", ["position", "seed", "sample_index"])
def test_uniforms_are_uniform_and_uncorrelated_along_each_part_of_the_key(along: str) -> None:
    key = {"seed": 3, "sample_index": 0, "position": 5}
    values = [uniform(**(key | {along: i})) for i in range(20_000)]
    assert 0.0 <= min(values) < max(values) < 1.0
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert stats.pearsonr(values[:-1], values[1:]).pvalue > 1e-3


def test_no_global_generator_is_touched() -> None:
    before = torch.get_rng_state(), random.getstate()
    uniform(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_locate_finds_the_step_that_exceeds_the_target() -> None:
    cumulative = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]], dtype=torch.float64)
    for target, index, remainder in [(0.0, 1, 0.0), (0.5, 1, 0.5), (1.0, 3, 0.0), (2.5, 3, 1.5)]:
        location = locate(cumulative, torch.tensor([target], dtype=torch.float64))
        assert (location[0].item(), location[1].item()) == (index, remainder)


def test_a_target_at_the_total_counts_as_just_below_it() -> None:
    index, remainder = locate(torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.float64), torch.tensor([3.0]).double())
    assert index.item() == 1
    assert remainder.item() == pytest.approx(2.0)


def test_a_draw_from_chunks_inverts_the_sum_in_vocabulary_order() -> None:
    weights = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [2.0, 1.0]]]).expand(4, 3, 2)
    cumulative = torch.tensor([[1.0, 1.0, 4.0]], dtype=torch.float64).expand(4, 3).contiguous()
    uniforms = torch.tensor([0.0, 0.24, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_from_chunks(weights, cumulative, uniforms).tolist() == [1, 1, 4, 5]


def test_a_draw_from_candidates_is_in_vocabulary_order_whatever_order_they_come_in() -> None:
    ids, weights = torch.tensor([[9, 2, 5], [5, 9, 2]]), torch.tensor([[3.0, 1.0, 0.0], [0.0, 3.0, 1.0]]).double()
    for u, token in [(0.0, 2), (0.2, 2), (0.25, 9), (0.999, 9)]:
        tokens, total = draw_from_candidates(ids, weights, torch.tensor([u, u], dtype=torch.float64))
        assert tokens.tolist() == [token, token]
        assert total.tolist() == [4.0, 4.0]


def test_candidates_of_weight_zero_do_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, 40, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(500, generator=generator)[:40] for _ in range(50)])
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    others = torch.arange(500, 700).expand(50, 200)
    wide_draw = draw_from_candidates(
        torch.cat([ids, others], 1), torch.cat([weights, torch.zeros(50, 200).double()], 1), uniforms
    )
    narrow = draw_from_candidates(ids, weights, uniforms)
    assert torch.equal(wide_draw[0], narrow[0])
    assert torch.equal(wide_draw[1], narrow[1])

"""Chunks give the bits of a full pass, and sums more exact than float32's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.models.vocabulary import CHUNK, Vocabulary, in_order

SIZES = [1, 5, CHUNK, CHUNK + 1, 1000, 20_000]


def logits_of(num_rows: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(num_rows, size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_argmax_is_the_first_greatest_logit(size: int, dtype: torch.dtype) -> None:
    logits = logits_of(7, size, dtype)
    assert torch.equal(Vocabulary.of(logits).argmax(), logits.float().argmax(-1))
    assert Vocabulary.of(torch.zeros(1, size)).argmax().item() == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_log_total_is_exact_to_a_ten_millionth(size: int) -> None:
    logits = logits_of(5, size)
    exact = logits.double().logsumexp(-1)
    torch.testing.assert_close(Vocabulary.of(logits).log_total(), exact, rtol=0, atol=2e-7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_greatest_are_those_of_a_stable_sort(size: int, count: int, dtype: torch.dtype) -> None:
    count = min(count, size)
    logits = logits_of(6, size, dtype).float()
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    values, tokens = Vocabulary.of(logits).greatest(count)
    assert torch.equal(values, sorted_logits[:, :count])
    assert torch.equal(tokens, order[:, :count])


def test_the_greatest_of_equal_logits_are_the_first_tokens() -> None:
    assert Vocabulary.of(torch.zeros(2, 9000)).greatest(3)[1].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_ranks_count_strictly_greater_logits() -> None:
    vocabulary = Vocabulary.of(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]).expand(4, 4))
    assert vocabulary.num_above(torch.tensor([1.0, 3.0, 4.0, -torch.inf])).tolist() == [2, 0, 0, 3]


def test_tops_share_a_rank_when_equal_and_have_each_row_s_own_length() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, -1.0]]).expand(3, 4)
    assert Vocabulary.of(logits).tops(torch.zeros(3, dtype=torch.float64), [0, 3, -1]) == [
        (),
        ((1, 1.0, 1), (2, 1.0, 1), (0, 0.0, 3)),
        ((1, 1.0, 1), (2, 1.0, 1), (0, 0.0, 3), (3, -1.0, 4)),
    ]


def test_order_is_by_logit_then_by_token_with_one_zero_and_infinities_at_the_ends() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -0.0, 2.0, torch.inf, -3.0]])
    assert in_order(logits, torch.tensor([[5, 4, 3, 2, 1, 0]]))[1].tolist() == [[1, 2, 3, 5, 0, 4]]


def test_caller_s_logits_are_never_written_to() -> None:
    logits = logits_of(3, CHUNK * 4)
    before = logits.clone()
    vocabulary = Vocabulary.of(logits)
    copy = vocabulary.take(torch.tensor([0, 1, 2]))
    copy.flat[:] = 0.0
    vocabulary.weights(torch.ones(3))
    assert torch.equal(logits, before)
    assert copy.refreshed().peak.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("size", [70, 4096, 50_257])
def test_a_row_s_sums_have_the_same_bits_in_any_batch(size: int, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        logits = logits_of(9, size)
        together = Vocabulary.of(logits).weights(torch.full((9,), 0.7))
        for i in range(9):
            alone = Vocabulary.of(logits[i : i + 1]).weights(torch.full((1,), 0.7))
            assert torch.equal(alone.values, together.values[i : i + 1])
            assert torch.equal(alone.cumulative, together.cumulative[i : i + 1])
    finally:
        torch.set_num_threads(before)

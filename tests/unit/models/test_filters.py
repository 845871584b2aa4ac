"""Filters keep what transformers' warpers keep, on the whole vocabulary and on candidates alike."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from penstock.models.filters import (
    Filters,
    apply_all_filters,
    drop_below,
    filter_candidates,
    filter_vocabulary,
    nucleus,
)
from penstock.models.sampler import Sampler
from penstock.models.vocabulary import in_order
from penstock.sampling import SamplingParams
from penstock.step import Row


def logits_of(num_rows: int, size: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def filters(num_rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Filters:
    def column(value: float) -> Tensor:
        return torch.full((num_rows,), value, dtype=torch.float64)

    return Filters(column(temperature), column(top_k).long(), column(top_p), column(min_p))


def weights_of(logits: Tensor, p: Filters) -> Tensor:
    return ((logits - logits.amax(-1, keepdim=True)) / p.temperature[:, None].float()).exp()


def transformers_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    chain: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    return LogitsProcessorList(chain)(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone()).softmax(-1)


CASES: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10_000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9},
    {"top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.8, "top_k": 200, "top_p": 0.97, "min_p": 0.001},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_vocabulary_is_filtered_as_transformers_does(case: dict[str, Any]) -> None:
    logits, p = logits_of(20, 1000), filters(20, **case)
    kept = filter_vocabulary(logits, weights_of(logits, p), p).double()
    ours = (kept / kept.sum(-1, keepdim=True)).float()
    torch.testing.assert_close(ours, transformers_probabilities(logits, **case), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "top_k" in case or "top_p" in case], ids=str)
@pytest.mark.parametrize("width", [64, 1000])
def test_candidates_are_filtered_as_transformers_does_where_they_are_sure(case: dict[str, Any], width: int) -> None:
    logits, p = logits_of(20, 1000), filters(20, **case)
    total = weights_of(logits, p).double().sum(-1)
    values, tokens = in_order(*logits.topk(width))
    kept, sure = filter_candidates(values, logits.amax(-1), total, p)
    ours = torch.zeros(20, 1000, dtype=torch.float64).scatter_(1, tokens, kept)
    ours = (ours / ours.sum(-1, keepdim=True)).float()
    sure |= width == 1000
    torch.testing.assert_close(ours[sure], transformers_probabilities(logits, **case)[sure], rtol=0, atol=1e-6)


def test_candidates_are_unsure_where_ties_continue_beyond_them() -> None:
    """Half of 100 equal tokens is 50: 64 candidates are unsure, since the ties continue beyond them."""
    logits = torch.zeros(1, 64)
    total = torch.tensor([100.0], dtype=torch.float64)
    assert not filter_candidates(logits, torch.zeros(1), total, filters(1, top_p=0.5))[1].item()
    assert not filter_candidates(logits, torch.zeros(1), total, filters(1, top_k=10))[1].item()
    logits[0, 1:] = -1.0
    assert filter_candidates(logits, torch.zeros(1), total, filters(1, top_p=0.01))[1].item()
    assert not filter_candidates(logits, torch.zeros(1), total, filters(1, top_p=0.02))[1].item()
    assert filter_candidates(logits, torch.zeros(1), total, filters(1, top_k=1))[1].item()
    descending = -torch.arange(64.0)[None]
    for top_k, is_sure in [(1, True), (63, True), (64, False), (65, False)]:
        assert filter_candidates(descending, torch.zeros(1), total, filters(1, top_k=top_k))[1].item() is is_sure


def test_rows_keep_their_own_parameters() -> None:
    logits = logits_of(len(CASES), 500)
    parts = [filters(1, **case) for case in CASES]
    p = Filters(*(torch.cat([getattr(f, name) for f in parts]) for name in ("temperature", "top_k", "top_p", "min_p")))
    together = filter_vocabulary(logits, weights_of(logits, p), p)
    for i, part in enumerate(parts):
        row = logits[i : i + 1]
        assert torch.equal(together[i : i + 1], filter_vocabulary(row, weights_of(row, part), part))


def test_a_nucleus_by_hand() -> None:
    weights = torch.tensor([[0.25, 1.0, 0.5, 0.25]]).expand(4, 4)
    kept = nucleus(weights, torch.tensor([0.4, 0.5, 0.51, 1.0], dtype=torch.float64))
    assert kept.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0.5, 0], [0.25, 1, 0.5, 0.25]]


def test_of_equal_weights_the_nucleus_keeps_the_first_tokens() -> None:
    kept = nucleus(torch.ones(3, 10), torch.tensor([0.3, 0.31, 1.0], dtype=torch.float64))
    assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 1, 2], [0, 1, 2, 3], list(range(10))]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_nuclei_of_coarse_logits_are_as_large_as_those_of_transformers(top_p: float) -> None:
    """bfloat16 logits have many ties: transformers keeps any of them, we keep the first."""
    logits = logits_of(10, 3000, scale=1.0).bfloat16().float()
    p = filters(10, top_p=top_p)
    kept = filter_vocabulary(logits, weights_of(logits, p), p) > 0
    ranked, tokens = in_order(logits, torch.arange(3000).expand(10, -1))
    before = ranked.double().softmax(-1).cumsum(-1) - ranked.double().softmax(-1)
    exact = torch.zeros_like(kept).scatter_(1, tokens, before < top_p)
    assert torch.equal(kept, exact)
    theirs = transformers_probabilities(logits, top_p=top_p) > 0
    assert torch.equal(kept.sum(-1), theirs.sum(-1))
    smallest = logits.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    assert not ((kept != theirs) & (logits != smallest)).any()


def test_min_p_drops_what_is_far_below_the_greatest() -> None:
    kept = drop_below(torch.tensor([[1.0, 0.5, 0.1], [1.0, 0.5, 0.1]]), torch.tensor([0.2, 0.0], dtype=torch.float64))
    assert kept.tolist() == [[1.0, 0.5, 0.0], pytest.approx([1.0, 0.5, 0.1])]


def test_impossible_tokens_stay_impossible() -> None:
    logits = logits_of(5, 2000)
    logits[:, ::2] = -torch.inf
    for case in CASES:
        p = filters(5, **case)
        kept = filter_vocabulary(logits, weights_of(logits, p), p)
        assert not kept[:, ::2].any()
        assert kept.any(-1).all()


WARPERS: dict[str, Any] = {
    "top_h": TopHLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
EVERY_FILTER: list[dict[str, float]] = [
    {"top_h": 0.1},
    {"top_h": 0.9},
    {"typical_p": 0.05},
    {"typical_p": 0.5},
    {"typical_p": 0.99},
    {"epsilon_cutoff": 0.001},
    {"epsilon_cutoff": 0.5},
    {"eta_cutoff": 0.01},
    {"eta_cutoff": 0.9},
    {"top_k": 20, "typical_p": 0.9},
    {"top_p": 0.9, "epsilon_cutoff": 0.02},
    {
        "top_h": 0.7,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.7,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.1,
    },
]


def row_of(number: int, **settings: Any) -> Row:
    return Row(number, [1], 0, 1, array("i"), True, SamplingParams(**settings), 1, seed=number)


@pytest.mark.parametrize("size", [50, 1000])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_all_filters_keep_what_transformers_keeps(size: int, scale: float) -> None:
    logits = logits_of(len(EVERY_FILTER), size, scale, seed=1)
    rows = [row_of(i, **case) for i, case in enumerate(EVERY_FILTER)]
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    columns = torch.tensor([[1.0, p.top_k, p.top_p, p.min_p] for p in (row.params for row in rows)]).double().T
    kept = apply_all_filters(logits, weights, Filters(columns[0], columns[1].long(), columns[2], columns[3]), rows) > 0
    for i, case in enumerate(EVERY_FILTER):
        chain = LogitsProcessorList(WARPERS[name](case[name]) for name in WARPERS if name in case)
        expected = chain(torch.zeros(1, 1, dtype=torch.int64), logits[i : i + 1].clone())[0].isfinite()
        assert torch.equal(kept[i], expected), case


def test_a_row_with_every_filter_draws_the_same_whatever_its_neighbours() -> None:
    logits = logits_of(4, 500, seed=1)
    rows = [row_of(0, typical_p=0.4), row_of(1), row_of(2, top_h=0.3, temperature=0.7), row_of(3, top_k=5)]
    together = Sampler(500, frozenset()).sample(logits, rows)
    alone = [Sampler(500, frozenset()).sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == alone

"""Cutoffs keep what transformers' warpers keep, each row by its own values."""

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
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from penstock.models.cutoffs import cut
from penstock.models.filters import Filters
from penstock.models.sampler import Sampler
from penstock.sampling import SamplingParams
from penstock.step import Row

WARPERS: dict[str, Any] = {
    "top_h": TopHLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
CASES: list[dict[str, float]] = [
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


def row_of(number: int, **wishes: Any) -> Row:
    return Row(number, [1], 0, 1, array("i"), True, SamplingParams(**wishes), 1, seed=number)


def logits_of(num_rows: int, size: int, scale: float) -> Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("size", [50, 1000])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_cutoffs_leave_what_transformers_leaves(size: int, scale: float) -> None:
    logits = logits_of(len(CASES), size, scale)
    rows = [row_of(i, **case) for i, case in enumerate(CASES)]
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    columns = torch.tensor([[1.0, p.top_k, p.top_p, p.min_p] for p in (row.params for row in rows)]).double().T
    kept = cut(logits, weights, Filters(columns[0], columns[1].long(), columns[2], columns[3]), rows) > 0
    for i, case in enumerate(CASES):
        chain = LogitsProcessorList(WARPERS[name](case[name]) for name in WARPERS if name in case)
        wanted = chain(torch.zeros(1, 1, dtype=torch.int64), logits[i : i + 1].clone())[0].isfinite()
        assert torch.equal(kept[i], wanted), case


def test_a_row_with_cutoffs_draws_the_same_whatever_its_neighbours() -> None:
    logits = logits_of(4, 500, 3.0)
    rows = [row_of(0, typical_p=0.4), row_of(1), row_of(2, top_h=0.3, temperature=0.7), row_of(3, top_k=5)]
    together = Sampler(500, frozenset()).sample(logits, rows)
    alone = [Sampler(500, frozenset()).sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == alone

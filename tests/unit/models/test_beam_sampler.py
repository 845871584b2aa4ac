"""The likeliest next tokens of beams: the model's own log probabilities, and those after the rules."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

from penstock.errors import ExecutionError, RequestError
from penstock.models.beam_sampler import BeamSampler
from penstock.sampling import SamplingParams
from penstock.step import Row, RowResult

EOS = 1


def row(tokens: list[int] | None = None, prompt_len: int = 2, width: int = 3, **options: Any) -> Row:
    values = {"use_beam_search": True, "best_of": width, "temperature": 0.0, "max_tokens": 9} | options
    text = [2, 3] if tokens is None else tokens
    return Row(0, text, len(text) - 1, len(text), array("i"), True, SamplingParams(**values), prompt_len)


def find(logits: torch.Tensor, rows: list[Row]) -> list[RowResult]:
    return BeamSampler(frozenset({EOS}), 1 << 20).candidates(logits, rows)


def noise(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [5, 100, 5000])
def test_candidates_are_the_likeliest_tokens_in_order(size: int) -> None:
    logits = noise(2, size)
    expected = torch.log_softmax(logits.double(), -1).topk(min(6, size))
    for i, result in enumerate(find(logits, [row(), row()])):
        assert [entry.token for entry in result.candidates] == expected.indices[i].tolist()
        assert [entry.logprob for entry in result.candidates] == pytest.approx(expected.values[i].tolist(), abs=1e-6)
        assert all(entry.sampled == entry.logprob for entry in result.candidates)
        assert {(entry.rank, entry.top) for entry in result.candidates} == {(0, ())}, "nobody asked"


def test_ties_go_to_the_first_tokens() -> None:
    (result,) = find(torch.zeros(1, 2000), [row()])
    assert [entry.token for entry in result.candidates] == [0, 1, 2, 3, 4, 5]


def test_rules_change_scores_and_not_the_models_logprobs() -> None:
    """As in transformers: the mass of tokens that are ruled out is not shared among the others."""
    logits = noise(1, 50)
    (plain,) = find(logits, [row()])
    best = plain.candidates[0].token
    (ruled,) = find(logits, [row(logit_bias={best: -1.5}, bad_words=[[plain.candidates[1].token]])])
    entries = {entry.token: entry for entry in ruled.candidates}
    assert entries[best].sampled == pytest.approx(plain.candidates[0].logprob - 1.5, abs=1e-6)
    assert entries[best].logprob == pytest.approx(plain.candidates[0].logprob, abs=1e-6)
    assert plain.candidates[1].token not in entries
    assert entries[plain.candidates[2].token].sampled == pytest.approx(plain.candidates[2].logprob, abs=1e-6)


def test_penalties_count_a_beams_current_tokens_only() -> None:
    """A beam's tokens change; counts kept from step to step belonged to another text."""
    logits, beams = noise(1, 20), BeamSampler(frozenset(), 1 << 20)
    tokens_before, tokens_after = [2, 3, 7, 7, 7], [2, 3, 8, 8, 8]
    (before,) = beams.candidates(logits, [row(tokens_before, repetition_penalty=2.0)])
    (result,) = beams.candidates(logits, [row(tokens_after, repetition_penalty=2.0)])
    (fresh,) = find(logits, [row(tokens_after, repetition_penalty=2.0)])
    assert result == fresh != before


def test_neighbours_with_rules_change_nothing() -> None:
    logits, rows = noise(3, 300), [row(), row(min_tokens=4), row(width=5)]
    alone = [find(logits[i : i + 1], [rows[i]])[0] for i in range(3)]
    assert find(logits, rows) == alone


def test_logprobs_that_were_asked_for_come_with_ranks_and_the_most_likely() -> None:
    (result,) = find(noise(1, 300), [row(logprobs=2)])
    assert [entry.rank for entry in result.candidates] == [1, 2, 3, 4, 5, 6]
    top = result.candidates[0].top
    assert [token for token, _, _ in top] == [entry.token for entry in result.candidates[:2]]
    assert all(entry.top == top for entry in result.candidates)


def test_a_vocabulary_smaller_than_the_request_gives_fewer_candidates() -> None:
    (result,) = find(noise(1, 300), [row(allowed_token_ids=[5, 9])])
    assert sorted(entry.token for entry in result.candidates) == [5, 9]


def test_an_error_belongs_to_its_own_row() -> None:
    def fail(ids: Any, logits: Any) -> Any:
        raise ValueError("no idea")

    logits = noise(4, 30)
    logits[1] = torch.nan
    rows = [row(), row(), row(logits_processors=[fail]), row(allowed_token_ids=[4], bad_words=[[4]])]
    good, sick, failed, impossible = find(logits, rows)
    assert len(good.candidates) == 6
    assert isinstance(sick.error, ExecutionError)
    assert isinstance(failed.error, RequestError)
    assert "no idea" in str(failed.error)
    assert "no token is left" in str(impossible.error)

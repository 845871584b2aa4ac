"""Scores of given tokens are those of the distribution that would have drawn them, and no batch changes a bit."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.errors import ExecutionError, RequestError
from penstock.kernels.logits import LogitKernels
from penstock.models.sampler import Sampler
from penstock.models.scoring import Prefix, RowScorer
from penstock.sampling import SamplingParams
from penstock.scores import Score
from penstock.scoring import ScoringParams
from penstock.step import Row, RowResult

EOS = frozenset({0})
PROMPT = [1, 2, 3]

COMPUTE: dict[str, LogitKernels | None] = {"kernels": None}


@pytest.fixture(autouse=True)
def with_and_without_kernels(logit_kernels: LogitKernels | None) -> None:
    """Every test of this file runs in plain torch, and with compiled kernels."""
    COMPUTE["kernels"] = logit_kernels


def logits_of(num_rows: int, size: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def row_of(tokens: Sequence[int], scored: range, params: SamplingParams) -> Row:
    tokens = list(tokens)
    end = min(scored.stop, len(tokens))
    return Row(3, tokens, scored.start - 1, end, array("i"), False, params, len(tokens), seed=5, scored=scored)


def score(logits: Tensor, row: Row, chunk_bytes: int = 2**28) -> RowResult:
    return RowScorer(logits.shape[1], EOS, chunk_bytes, COMPUTE["kernels"]).score(logits, row)


def score_of(logits: Tensor, row: Row, chunk_bytes: int = 2**28) -> Score:
    part = score(logits, row, chunk_bytes).scores
    assert part is not None
    return part.score


def sampled(logits: Tensor, params: SamplingParams) -> tuple[list[int], list[float]]:
    """The tokens that a sequence draws from these logits, one row each, and their log probabilities as sampled."""
    sampler, tokens, logprobs = Sampler(logits.shape[1], EOS, kernels=COMPUTE["kernels"]), list(PROMPT), []
    for i in range(len(logits)):
        row = Row(3, tokens, len(tokens) - 1, len(tokens), array("i"), True, params, len(PROMPT), seed=5)
        (result,) = sampler.sample(logits[i : i + 1], [row])
        assert result.error is None
        logprobs.append(result.logprobs[0].sampled)
        tokens = [*tokens, *result.tokens]
    return tokens, logprobs


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_p": 0.8},
    {"top_p": 0.8, "temperature": 1.7},
    {"top_p": 0.9999, "temperature": 3.0},
    {"top_k": 5},
    {"top_k": 1500, "temperature": 2.0},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": {5: 4.0}, "bad_words": [[7, 8]], "top_p": 0.9},
    {"min_tokens": 4, "stop_token_ids": [6]},
    {"no_repeat_ngram_size": 2, "suppress_tokens": [9]},
    {"allowed_token_ids": list(range(40)), "temperature": 0.0},
    {"logits_processors": [lambda output, logits: logits * (1 + len(output) / 10)]},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [100, 3000])
@pytest.mark.parametrize("chunk_bytes", [2**28, 64 * 3000 * 3])
def test_tempered_scores_are_bit_for_bit_what_the_sampler_reported(
    way: dict[str, Any], size: int, chunk_bytes: int
) -> None:
    """T1 and T2: the filters and the temperature of the request count."""
    logits, params = logits_of(12, size), SamplingParams(**way, max_tokens=20)
    tokens, logprobs = sampled(logits, params)
    scoring = ScoringParams.of(params, 12, logits=False, entropies=False)
    result = score_of(logits, row_of(tokens, range(3, 15), scoring), chunk_bytes)
    assert result.tempered.tolist() == np.array(logprobs, dtype=np.float32).tolist()


def test_a_token_that_could_not_have_been_drawn_has_the_probability_0() -> None:
    logits = logits_of(2, 3000)
    worst = logits.argmin(-1).tolist()
    for way in ({"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}, {"min_p": 0.5}, {"suppress_tokens": worst}):
        scoring = ScoringParams.of(SamplingParams(**way), 2, logits=False, entropies=False)
        result = score_of(logits, row_of([*PROMPT, *worst], range(3, 5), scoring))
        assert result.tempered.tolist() == [-np.inf] * 2
        assert np.isfinite(result.logprobs).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [100, 3001])
def test_everything_a_score_holds_is_that_of_log_softmax(dtype: torch.dtype, size: int) -> None:
    logits = logits_of(4, size).to(dtype)
    tokens = [*PROMPT, 11, 12, 13, 14]
    result = score_of(
        logits, row_of(tokens, range(3, 7), ScoringParams(num_scored=4, wants_logits=True, wants_entropies=True))
    )
    exact = logits.double().log_softmax(-1)
    assert result.logprobs == pytest.approx(exact[range(4), tokens[3:]].numpy(), abs=1e-6)
    assert result.entropies == pytest.approx(-(exact.exp() * exact).sum(-1).numpy(), abs=1e-5)
    assert result.logits.tolist() == logits.float().tolist()
    assert result.tempered is None
    assert {array.dtype for array in (result.logprobs, result.entropies, result.logits)} == {np.dtype("float32")}


def test_entropies_of_a_vocabulary_with_tokens_ruled_out_are_finite() -> None:
    logits = logits_of(2, 100)
    logits[:, 50:] = -torch.inf
    result = score_of(logits, row_of([*PROMPT, 4, 5], range(3, 5), ScoringParams(num_scored=2, wants_entropies=True)))
    exact = logits[:, :50].double().log_softmax(-1)
    assert result.entropies == pytest.approx(-(exact.exp() * exact).sum(-1).numpy(), abs=1e-5)


def test_the_logits_of_a_score_are_a_copy() -> None:
    logits = logits_of(2, 100)
    result = score_of(logits, row_of([*PROMPT, 4, 5], range(3, 5), ScoringParams(num_scored=2, wants_logits=True)))
    before = result.logits.copy()
    logits.zero_()
    assert (result.logits == before).all()


@pytest.mark.parametrize("chunk_bytes", [1, 64 * 1000 * 3])
def test_chunks_do_not_change_a_bit(chunk_bytes: int) -> None:
    logits, tokens = logits_of(39, 1000), range(40)
    prompt = row_of(tokens, range(1, 40), SamplingParams(prompt_logprobs=3))
    assert score(logits, prompt, chunk_bytes) == score(logits, prompt)
    params = ScoringParams(num_scored=39, tempers=True, top_p=0.9, temperature=0.8, wants_entropies=True)
    results = [score_of(logits, row_of(tokens, range(1, 40), params), each) for each in (chunk_bytes, 2**28)]
    for name in ("logprobs", "tempered", "entropies"):
        assert getattr(results[0], name).tolist() == getattr(results[1], name).tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_numbers_are_the_row_s_error(bad: float) -> None:
    """T16: a NaN reached the trainer. A caller of prompt logprobs got one too."""
    logits, tokens = logits_of(3, 100), [*PROMPT, 4]
    for params in (SamplingParams(prompt_logprobs=0), ScoringParams(num_scored=3)):
        row = row_of(tokens, range(1, 4), params)
        assert score(logits, row).error is None
        broken = logits.clone()
        broken[1, tokens[2]] = bad
        result = score(broken, row)
        assert isinstance(result.error, ExecutionError) or (bad == -torch.inf and result.prompt_logprobs)


def test_a_processor_that_fails_and_rules_that_leave_nothing_are_the_row_s_error() -> None:
    def fail(output: list[int], logits: Tensor) -> Tensor:
        raise ValueError("no")

    for way, message in (({"logits_processors": [fail]}, "no"), ({"suppress_tokens": range(100)}, "no token is left")):
        scoring = ScoringParams.of(SamplingParams(**way), 1, logits=False, entropies=False)
        error = score(logits_of(1, 100), row_of([*PROMPT, 4], range(3, 4), scoring)).error
        assert isinstance(error, RequestError)
        assert message in str(error)


@pytest.mark.parametrize("scored", [range(1, 6), range(1, 4), range(4, 6)])
def test_prompt_logprobs_are_those_of_log_softmax(scored: range) -> None:
    tokens = [11, 12, 13, 14, 15, 16]
    logits = logits_of(len(scored), 100)
    entries = score(logits, row_of(tokens, scored, SamplingParams(prompt_logprobs=2))).prompt_logprobs
    exact = logits.double().log_softmax(-1)
    assert [entry.token for entry in entries] == [tokens[position] for position in scored]
    for i, entry in enumerate(entries):
        assert entry.logprob == entry.sampled == pytest.approx(exact[i, entry.token].item(), abs=1e-6)
        assert entry.rank == (exact[i] > exact[i, entry.token]).sum().item() + 1
        best = exact[i].topk(2)
        assert [token for token, _, _ in entry.top] == best.indices.tolist()
        assert [p for _, p, _ in entry.top] == pytest.approx(best.values.tolist(), abs=1e-6)
        assert [rank for _, _, rank in entry.top] == [1, 2]


@pytest.mark.parametrize(("count", "length"), [(0, 0), (1, 1), (-1, 20)])
def test_prompt_logprobs_have_a_rank_always_and_as_many_tops_as_asked(count: int, length: int) -> None:
    row = row_of([1, 2, 3], range(1, 3), SamplingParams(prompt_logprobs=count))
    entries = score(logits_of(2, 20), row).prompt_logprobs
    assert [(len(entry.top), entry.rank > 0) for entry in entries] == [(length, True)] * 2


def test_a_forgotten_sequence_leaves_no_state() -> None:
    def processor(output: list[int], logits: Tensor) -> Tensor:
        return logits

    scorer, reference = RowScorer(20, EOS, 2**20, COMPUTE["kernels"]), weakref.ref(processor)
    params = ScoringParams(num_scored=1, tempers=True, logits_processors=[processor])
    scorer.score(logits_of(1, 20), row_of([1, 2], range(1, 2), params))
    del processor, params
    assert reference() is not None
    scorer.forget(3)
    scorer.forget(3)
    assert reference() is None


def test_a_prefix_reads_like_the_list_cut_there() -> None:
    tokens = [5, 6, 7, 8, 9]
    for length in range(6):
        prefix, cut = Prefix(tokens, length), tokens[:length]
        assert (len(prefix), list(prefix), prefix[-3:], prefix[1:], prefix[1:2]) == (
            length,
            cut,
            cut[-3:],
            cut[1:],
            cut[1:2],
        )
        if length:
            assert (prefix[-1], prefix[0]) == (cut[-1], cut[0])
        with pytest.raises(IndexError):
            prefix[length]

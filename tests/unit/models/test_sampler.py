"""The sampler draws from exactly the requested distribution, and no row affects another."""

from __future__ import annotations

import math
import random
import sys
import weakref
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.errors import ExecutionError, RequestError
from penstock.kernels.logits import LogitKernels
from penstock.models.sampler import Sampler
from penstock.sampling import SamplingParams
from penstock.step import Row, RowResult

EOS = frozenset({0})

COMPUTE: dict[str, LogitKernels | None] = {"kernels": None}


@pytest.fixture(autouse=True)
def with_and_without_kernels(logit_kernels: LogitKernels | None) -> None:
    """Every test of this file runs in plain torch, and with compiled kernels."""
    COMPUTE["kernels"] = logit_kernels


def sampler_of(size: int, chunk_bytes: int = 2**28) -> Sampler:
    return Sampler(size, EOS, chunk_bytes, COMPUTE["kernels"])


def row_of(seq_id: int = 0, tokens: Sequence[int] = (1, 2, 3, 4), prompt_len: int = 3, **params: Any) -> Row:
    tokens = list(tokens)
    return Row(
        seq_id=seq_id,
        tokens=tokens,
        start=len(tokens) - 1,
        end=len(tokens),
        blocks=array("i"),
        samples=True,
        params=SamplingParams(max_tokens=None, **params),
        prompt_len=prompt_len,
        seed=seq_id,
    )


def logits_of(num_rows: int, size: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def sample(logits: Tensor, *rows: Row, chunk_bytes: int = 2**28) -> list[RowResult]:
    return sampler_of(logits.shape[1], chunk_bytes).sample(logits, rows)


def tokens_of(results: Sequence[RowResult]) -> list[int]:
    assert all(result.error is None for result in results)
    return [token for result in results for token in result.tokens]


def draws(logits: Tensor, count: int, **params: Any) -> list[int]:
    """`count` draws after the same logits [V], at distinct positions."""
    row, sampler = row_of(**params), sampler_of(len(logits))
    copies = logits.expand(5000, -1).contiguous()
    tokens: list[int] = []
    for begin in range(0, count, 5000):
        tokens += tokens_of(sampler.sample(copies, [row._replace(end=begin + i) for i in range(5000)]))
    return tokens


def warped(logits: Tensor, **params: Any) -> Tensor:
    """transformers' scores [R, V] after its warpers, in its order."""
    p = SamplingParams(**params)
    chain: list[Any] = [TemperatureLogitsWarper(p.temperature)] if p.temperature != 1 else []
    chain += [TopKLogitsWarper(p.top_k)] if p.top_k else []
    chain += [TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
    chain += [MinPLogitsWarper(p.min_p)] if p.min_p else []
    return LogitsProcessorList(chain)(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone())


WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 7},
    {"top_k": 900},
    {"top_p": 0.8},
    {"top_p": 0.99, "temperature": 1.5},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "temperature": 0.8},
    {"top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.parametrize("params", [{"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}], ids=str)
def test_draws_follow_the_exact_distribution(params: dict[str, Any]) -> None:
    logits = logits_of(1, 40, scale=1.5)[0]
    check_distribution(logits, draws(logits, 100_000, **params), **params)


@pytest.mark.parametrize("params", WAYS, ids=str)
def test_draws_of_every_kind_follow_the_exact_distribution(params: dict[str, Any]) -> None:
    logits = logits_of(1, 30, scale=1.0, seed=1)[0]
    check_distribution(logits, draws(logits, 5_000, **params), **params)


def test_draws_from_a_nucleus_larger_than_any_candidate_list_follow_the_exact_distribution() -> None:
    logits = logits_of(1, 1100, scale=0.5)[0]
    check_distribution(logits, draws(logits, 5_000, top_p=0.9), top_p=0.9)


def check_distribution(logits: Tensor, tokens: list[int], **params: Any) -> None:
    exact = warped(logits[None], **params).double().softmax(-1)[0]
    counts = torch.bincount(torch.tensor(tokens), minlength=len(logits))
    mask = exact > 0
    assert not counts[~mask].any()
    if mask.sum() > 1:
        assert stats.chisquare(counts[mask].numpy(), (exact[mask] * len(tokens)).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("params", WAYS, ids=str)
@pytest.mark.parametrize(("size", "scale"), [(300, 3.0), (5000, 3.0), (5000, 0.7)])
def test_logprobs_are_the_model_s_and_the_sampled_ones_those_of_transformers_chain(
    params: dict[str, Any], size: int, scale: float
) -> None:
    logits = logits_of(25, size, scale)
    scores = warped(logits, **params).double().log_softmax(-1)
    logprobs = logits.double().log_softmax(-1)
    for i, result in enumerate(sample(logits, *(row_of(i, **params) for i in range(25)))):
        (entry,) = result.logprobs
        assert (entry.token,) == result.tokens
        assert entry.logprob == pytest.approx(logprobs[i, entry.token].item(), abs=1e-6)
        assert entry.sampled == pytest.approx(scores[i, entry.token].item(), abs=3e-6)
        assert (entry.rank, entry.top) == (0, ())


def test_sampled_is_the_scaled_logit_less_the_log_of_the_kept_mass() -> None:
    logits, temperature = logits_of(50, 3000), 0.7
    mask = warped(logits, temperature=temperature, top_k=80, top_p=0.9).isfinite()
    scaled = logits.double() / temperature
    mass = scaled.masked_fill(~mask, -torch.inf).logsumexp(-1)
    for i, result in enumerate(
        sample(logits, *(row_of(i, temperature=temperature, top_k=80, top_p=0.9) for i in range(50)))
    ):
        assert result.logprobs[0].sampled == pytest.approx((scaled[i, result.tokens[0]] - mass[i]).item(), abs=1e-6)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.0, "top_p": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_greedy_takes_the_first_of_the_greatest_logits(params: dict[str, Any], dtype: torch.dtype) -> None:
    logits = logits_of(20, 777).to(dtype)
    results = sample(logits, *(row_of(i, **params) for i in range(20)))
    assert tokens_of(results) == logits.float().argmax(-1).tolist()
    assert {result.logprobs[0].sampled for result in results} == {0.0}


def test_a_temperature_next_to_zero_is_greedy() -> None:
    logits = logits_of(5, 100)
    assert tokens_of(sample(logits, *(row_of(i, temperature=1e-320) for i in range(5)))) == logits.argmax(-1).tolist()


def test_logprobs_ranks_and_tops_by_hand() -> None:
    logits = torch.tensor([0.125, 0.5, 0.25, 0.125]).log()[None] + 7.0
    rows = [row_of(i, temperature=0.0, logprobs=k, logit_bias={2: 50.0}) for i, k in enumerate((None, 0, 2, -1, 99))]
    entries = [result.logprobs[0] for result in sample(logits.repeat(5, 1), *rows)]
    assert [(entry.token, entry.rank) for entry in entries] == [(2, 0), (2, 2), (2, 2), (2, 2), (2, 2)]
    assert [entry.logprob for entry in entries] == pytest.approx([math.log(0.25)] * 5, abs=1e-6)
    every = [(1, 1), (2, 2), (0, 3), (3, 3)]
    assert [[(token, rank) for token, _, rank in entry.top] for entry in entries] == [[], [], every[:2], every, every]
    assert [p for _, p, _ in entries[3].top] == pytest.approx(
        [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)], abs=1e-6
    )


def test_min_tokens_suppresses_eos_until_reached() -> None:
    logits = torch.tensor([[9.0, 1.0, 5.0]])
    sampler = sampler_of(3)
    for output, token in [([], 2), ([2], 2), ([2, 2], 0)]:
        row = row_of(tokens=[1, 1, 1, *output], temperature=0.0, min_tokens=2)
        assert tokens_of(sampler.sample(logits, [row])) == [token]
    row = row_of(tokens=[1, 1, 1], temperature=0.0, min_tokens=2)._replace(stop_ids=frozenset({2}))
    assert tokens_of(sampler.sample(logits, [row])) == [1]


def test_bad_words_of_several_tokens_are_never_completed() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 5.0]])
    words = [[3, 2], [3]]
    assert tokens_of(sample(logits, row_of(tokens=[1, 1, 3], temperature=0.0, bad_words=words))) == [1]
    assert tokens_of(sample(logits, row_of(tokens=[1, 3, 1], temperature=0.0, bad_words=words))) == [2]


def test_bias_and_allowed_tokens_decide_the_choice() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4, 1)
    rows = [
        row_of(i, temperature=0.0, **params)
        for i, params in enumerate(
            [{"logit_bias": {0: 10.0}}, {"logit_bias": {3: -100.0}}, {"allowed_token_ids": [0, 1]}, {}]
        )
    ]
    assert tokens_of(sample(logits, *rows)) == [0, 2, 1, 3]


def test_penalties_follow_a_sequence_as_it_grows() -> None:
    """Greedy decoding with penalties, step by step with one sampler, agrees with counting all tokens at every step."""
    logits = logits_of(30, 50, scale=1.0)
    params = {"temperature": 0.0, "repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    row, sampler = row_of(tokens=[7, 7, 8], **params), sampler_of(50)
    tokens = row.tokens
    assert isinstance(tokens, list)
    for step in range(30):
        if step == 10:
            sampler.forget(row.seq_id)
        if step == 20:
            tokens += [5, 5, 6]
        scores = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([tokens]), logits[step][None].clone())[0]
        counts = torch.bincount(torch.tensor(tokens[3:], dtype=torch.int64), minlength=50)
        expected = (scores - 0.2 * counts - 0.3 * (counts > 0)).argmax().item()
        next_tokens = tokens_of(sampler.sample(logits[step : step + 1], [row._replace(end=len(tokens))]))
        assert next_tokens == [expected]
        tokens += next_tokens


def test_a_reused_id_does_not_inherit_another_sequence_s_counts() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.1]])
    sampler = sampler_of(3)
    assert tokens_of(sampler.sample(logits, [row_of(tokens=[0, 0, 0, 2], temperature=0.0, presence_penalty=1.0)])) == [
        1
    ]
    assert tokens_of(sampler.sample(logits, [row_of(tokens=[0, 0, 0, 1], temperature=0.0, presence_penalty=1.0)])) == [
        2
    ]


def failing(output: list[int], logits: Tensor) -> Tensor:
    logits.fill_(torch.nan)
    raise ValueError("broken on purpose")


def test_a_failing_processor_ends_its_own_row_only() -> None:
    logits = logits_of(4, 100)
    alone = sample(logits, *(row_of(i) for i in range(4)))
    rows = [row_of(i, logits_processors=[failing] if i == 2 else []) for i in range(4)]
    results = sample(logits, *rows)
    assert [results[i] for i in (0, 1, 3)] == [alone[i] for i in (0, 1, 3)]
    assert isinstance(results[2].error, RequestError)
    assert "failing failed: ValueError: broken on purpose" in str(results[2].error)
    assert (results[2].tokens, results[2].logprobs) == ((), ())


@pytest.mark.parametrize(
    "params",
    [
        {"logits_processors": [lambda output, logits: logits * torch.nan]},
        {"logits_processors": [lambda output, logits: torch.full_like(logits, -torch.inf)]},
        {"allowed_token_ids": [5], "bad_words": [[5]]},
        {"allowed_token_ids": [0], "min_tokens": 5},
        {"allowed_token_ids": [10**6]},
    ],
)
@pytest.mark.parametrize("way", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("size", [100, 3000])
def test_a_row_without_any_token_left_is_an_error(params: dict[str, Any], way: dict[str, Any], size: int) -> None:
    logits = logits_of(2, size)
    results = sample(logits, row_of(0, **way), row_of(1, **params, **way))
    assert results[0] == sample(logits[:1], row_of(0, **way))[0]
    assert isinstance(results[1].error, RequestError)
    assert "no token is left" in str(results[1].error)


def test_a_processor_may_force_a_token_with_infinity() -> None:
    def force(output: list[int], logits: Tensor) -> Tensor:
        logits[42] = torch.inf
        return logits

    ways: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.5}]
    rows = [row_of(i, logits_processors=[force], **way) for i, way in enumerate(ways)]
    results = sample(logits_of(5, 3000), *rows)
    assert tokens_of(results) == [42] * 5
    assert [result.logprobs[0].sampled for result in results] == [0.0] * 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("size", [100, 3000])
def test_logits_that_are_not_numbers_end_their_own_row_only(bad: float, way: dict[str, Any], size: int) -> None:
    logits = logits_of(3, size)
    clean = sample(logits, *(row_of(i, logprobs=2, **way) for i in range(3)))
    logits[1, 17] = bad
    results = sample(logits, *(row_of(i, logprobs=2, **way) for i in range(3)))
    assert isinstance(results[1].error, ExecutionError)
    assert [results[0], results[2]] == [clean[0], clean[2]]


def mixture(num_rows: int) -> list[Row]:
    """Rows of every kind, each with its own parameters."""
    ways = [*WAYS, {"temperature": 0.0}, {"temperature": 0.0, "logprobs": 3}, {"logprobs": 7, "top_p": 0.7}]
    ruled: list[dict[str, Any]] = [
        {"repetition_penalty": 1.2},
        {"logit_bias": {5: 2.0}, "top_k": 20},
        {"min_tokens": 9, "top_p": 0.95},
        {"logits_processors": [lambda output, logits: logits * 0.9]},
        {"presence_penalty": 0.5, "bad_words": [[4, 1]], "temperature": 0.0},
    ]
    every = ways + ruled
    return [row_of(i, tokens=[1, 2, 3, 4, i % 7], **every[i % len(every)]) for i in range(num_rows)]


@pytest.mark.parametrize(
    ("dtype", "size", "num_threads"),
    [(torch.float32, 333, 1), (torch.float32, 4096, 2), (torch.bfloat16, 5000, 1), (torch.bfloat16, 5000, 2)],
)
def test_neighbours_never_change_a_bit_of_a_row(dtype: torch.dtype, size: int, num_threads: int) -> None:
    logits, rows = logits_of(40, size).to(dtype), mixture(40)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = sample(logits, *rows)
        assert together == [sample(logits[i : i + 1], row)[0] for i, row in enumerate(rows)]
        order = random.Random(0).sample(range(40), 25)
        assert sample(logits[order], *(rows[i] for i in order)) == [together[i] for i in order]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chunk_bytes", [1, 64 * 1000 * 3])
def test_chunks_do_not_change_a_bit(chunk_bytes: int) -> None:
    logits, rows = logits_of(40, 1000), mixture(40)
    assert sample(logits, *rows, chunk_bytes=chunk_bytes) == sample(logits, *rows)


def test_logits_in_any_memory_layout_give_the_same_results() -> None:
    logits, rows = logits_of(6, 640), mixture(6)
    strided = torch.stack([logits, logits], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert sample(strided, *rows) == sample(logits, *rows)


def test_a_seed_repeats_its_draws_and_each_part_of_the_key_changes_them() -> None:
    logits = torch.zeros(4, 5000)
    row = row_of(3)
    keys = [row, row._replace(seed=4), row._replace(sample_index=1), row._replace(end=row.end + 1)]
    tokens = tokens_of(sample(logits, *keys))
    assert tokens == tokens_of(sample(logits, *keys))
    assert len(set(tokens)) == 4


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state(), random.getstate()
    sample(logits_of(40, 500), *mixture(40))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_the_caller_s_logits_are_left_alone() -> None:
    logits = logits_of(40, 640)
    before = logits.clone()
    sample(logits, *mixture(40))
    assert torch.equal(logits, before)


def test_no_rows_give_no_results() -> None:
    assert sample(torch.zeros(0, 10)) == []


def test_a_forgotten_sequence_leaves_no_state() -> None:
    def processor(output: list[int], logits: Tensor) -> Tensor:
        return logits

    sampler, reference = sampler_of(20), weakref.ref(processor)
    sampler.sample(logits_of(1, 20), [row_of(seq_id=3, logits_processors=[processor])])
    del processor
    assert reference() is not None
    sampler.forget(3)
    sampler.forget(3)
    assert reference() is None


def test_a_top_k_beyond_the_vocabulary_or_a_huge_temperature_affects_no_other_row() -> None:
    """`top_k=sys.maxsize` became negative in a float64 and failed the step of every request."""
    logits = logits_of(3, 5000)
    alone = tokens_of(sample(logits[:1], row_of(0)))
    mixed = sample(logits, row_of(0), row_of(1, top_k=sys.maxsize, top_p=0.9), row_of(2, temperature=1e300))
    assert tokens_of(mixed)[0] == alone[0]
    results = [tokens_of(sample(logits[:1], row_of(7, top_k=top_k))) for top_k in (5000, 6000, sys.maxsize)]
    assert results[0] == results[1] == results[2]

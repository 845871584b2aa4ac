"""A draft counts as far as the model says the same; the step's tokens are those of a step without drafts."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import numpy as np
import pytest
import torch

from penstock.errors import RequestError
from penstock.models.sampler import Sampler
from penstock.optimizers.speculation.verification import num_accepted, positions, verified
from penstock.sampling import SamplingParams
from penstock.step import Row, RowResult, TokenLogprobs


def row_of(draft: tuple[int, ...] = (), tokens: tuple[int, ...] = (5, 6, 7), seed: int = 0, **params: float) -> Row:
    end = len(tokens) + len(draft)
    settings = SamplingParams(max_tokens=None, **params)
    return Row(0, list(tokens), len(tokens) - 1, end, array("i"), True, settings, 2, seed=seed, draft=draft)


def drawn(*tokens: int | Exception) -> list[RowResult]:
    return [
        RowResult(error=token)
        if isinstance(token, Exception)
        else RowResult((token,), (TokenLogprobs(token, -float(token), 0.0),))
        for token in tokens
    ]


def accepted(drafts: list[list[int]], draws: list[list[int]]) -> list[int]:
    flat = np.array([token for draft in drafts for token in draft], dtype=np.int64)
    lengths = np.array([len(draft) for draft in drafts], dtype=np.int64)
    return num_accepted(flat, lengths, np.array([token for draw in draws for token in draw], dtype=np.int64)).tolist()


def test_a_row_is_drawn_from_at_its_end_and_after_each_draft() -> None:
    plain, drafted = row_of(), row_of(draft=(8, 9))
    assert positions(plain) == [plain]
    found = positions(drafted)
    assert [(row.end, row.draft) for row in found] == [(3, ()), (4, (8,)), (5, (8, 9))]
    assert all(row.tokens is drafted.tokens for row in found)


def test_drafts_are_accepted_up_to_the_first_wrong_one() -> None:
    drafts = [[1, 2, 3], [], [1, 2, 3], [4], [4], [7, 7]]
    draws = [[1, 2, 3, 9], [5], [1, 9, 3, 9], [4, 4], [5, 4], [8, 7, 7]]
    assert accepted(drafts, draws) == [3, 0, 1, 1, 0, 0]


def test_rows_without_any_draft_accept_nothing() -> None:
    assert accepted([[], []], [[3], [4]]) == [0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_ragged_rows_is_counted_as_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    drafts = [[rng.randrange(2) for _ in range(rng.randrange(6))] for _ in range(rng.randrange(1, 40))]
    draws = [[rng.randrange(2) for _ in range(len(draft) + 1)] for draft in drafts]
    expected = []
    for draft, draw in zip(drafts, draws, strict=True):
        count = 0
        while count < len(draft) and draft[count] == draw[count]:
            count += 1
        expected.append(count)
    assert accepted(drafts, draws) == expected


def test_a_result_holds_the_accepted_drafts_and_one_token_more() -> None:
    rows = [row_of((8, 9)), row_of(), row_of((8, 9)), row_of((8, 9))]
    results = verified(rows, drawn(8, 9, 1, 4, 8, 2, 3, 7, 9, 1))
    assert [result.tokens for result in results] == [(8, 9, 1), (4,), (8, 2), (7,)]
    assert [entry.logprob for entry in results[0].logprobs] == [-8.0, -9.0, -1.0]
    assert [result.num_accepted for result in results] == [2, 0, 1, 0]


def test_a_fault_behind_a_wrong_draft_never_happened() -> None:
    (result,) = verified([row_of((8, 9))], drawn(7, RequestError("a processor failed"), 1))
    assert (result.tokens, result.error) == ((7,), None)


def test_a_fault_behind_right_drafts_is_left_to_the_next_step() -> None:
    """Without drafts the tokens before it would have been told, too."""
    (result,) = verified([row_of((8, 9))], drawn(8, 9, RequestError("a processor failed")))
    assert (result.tokens, result.error) == ((8, 9), None)


def test_a_fault_at_the_first_position_is_the_rows() -> None:
    error = RequestError("a processor failed")
    (result,) = verified([row_of((8, 9))], drawn(error, 9, 1))
    assert (result.tokens, result.error) == ((), error)


VOCAB = 4
CHAIN = torch.tensor([1.0, 0.5, 0.0, -0.5]) + 1.5 * torch.eye(VOCAB).roll(1, 1)  # row: the token before


def by_chain(rows: list[Row]) -> torch.Tensor:
    """Logits of a model that looks at the last token only."""
    return CHAIN[[(*row.tokens, *row.draft)[-1] for row in rows]]


def two_tokens(draft: tuple[int, ...], seed: int, **params: float) -> tuple[int, ...]:
    """What two or more steps give, the first of them with a draft."""
    sampler, tokens, draft = Sampler(VOCAB, frozenset()), (3, 1), draft
    while len(tokens) < 4:
        row = row_of(draft, tokens, seed, **params)
        rows = positions(row)
        (result,) = verified([row], sampler.sample(by_chain(rows), rows))
        tokens, draft = (*tokens, *result.tokens), ()
    return tokens[2:4]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6}, {"top_p": 0.8}, {"presence_penalty": 1.5}])
def test_drafts_change_no_token_whatever_is_guessed(params: dict[str, float]) -> None:
    rng = random.Random(1)
    for seed in range(60):
        guess = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 4)))
        assert two_tokens(guess, seed, **params) == two_tokens((), seed, **params)


def test_speculated_output_has_the_models_distribution() -> None:
    """Total variation from the exact joint distribution of two tokens; both, one or none of them was guessed right."""
    count, first = 50_000, CHAIN[1].softmax(-1)
    exact = (first[:, None] * CHAIN.softmax(-1)).double()
    rng = random.Random(0)
    rows = [row_of((rng.randrange(VOCAB),), (3, 1), seed) for seed in range(count)]
    sampler, places = Sampler(VOCAB, frozenset()), [place for row in rows for place in positions(row)]
    results = verified(rows, sampler.sample(by_chain(places), places))
    short = [row_of((), (3, 1, *result.tokens), row.seed) for row, result in zip(rows, results, strict=True)]
    rest = [row for row in short if len(row.tokens) == 3]
    ends = iter(sampler.sample(by_chain(rest), rest))
    seen = Counter(
        (result.tokens[0], result.tokens[1] if result.num_accepted else next(ends).tokens[0]) for result in results
    )
    found = torch.tensor([[seen[a, b] / count for b in range(VOCAB)] for a in range(VOCAB)], dtype=torch.float64)
    assert 0.2 < len([result for result in results if result.num_accepted]) / count < 0.3
    assert float((found - exact).abs().sum() / 2) < 0.01

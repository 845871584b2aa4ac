from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from penstock import GrammarError, RequestError, SamplingParams
from penstock.constraint import MaskRequest
from penstock.constraints.masks import Masks
from penstock.kernels import native
from penstock.kernels.logits import LogitKernels
from penstock.models.masking import mask_rows, rule_out
from penstock.models.sampler import Sampler
from penstock.models.vocabulary import CHUNK
from penstock.step import Row, StepPlan

VOCAB = 100


class Allowing:
    """A constraint and its filler at once: allows `tokens`, after a draft of one token those of `then`."""

    num_words = 3  # tokens from 96 on have no bit
    ends_itself = is_complete = False
    prefers_candidates = True

    def __init__(self, *tokens: int, then: Sequence[int] = (), error: GrammarError | None = None) -> None:
        self.tokens, self.then, self.failure = tokens, then, error
        self.asked: list[int] = []  # candidates

    @property
    def filler(self) -> Allowing:
        return self

    def fill(self, requests: Sequence[MaskRequest], bits: array[int]) -> Mapping[int, GrammarError]:
        errors = {}
        for place, request in enumerate(requests):
            constraint: Any = request.constraint
            for i, tokens in enumerate((constraint.tokens, constraint.then)[: 1 + len(request.draft)]):
                mask = sum(1 << token for token in tokens).to_bytes(4 * self.num_words, "little")
                begin = self.num_words * (request.first + i)
                bits[begin : begin + self.num_words] = array("i", mask)
            if constraint.failure is not None:
                errors[place] = constraint.failure
        return errors

    def first_allowed(self, candidates: Sequence[int]) -> int | None:
        self.asked += candidates
        return next((token for token in candidates if token in self.tokens), None)

    def advance(self, tokens: Sequence[int]) -> int:
        return len(tokens)

    def trim(self, draft: Sequence[int]) -> tuple[int, ...]:
        return tuple(draft)

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        return ()


class AllowingOfMany(Allowing):
    """The same for a vocabulary of thousands."""

    num_words = 90


def row(seq_id: int, constraint: Allowing | None, **params: Any) -> Row:
    return Row(seq_id, [1, 2], 1, 2, array("i"), True, SamplingParams(**params), 1, constraint=constraint)


def filled(rows: Sequence[Row]) -> Masks:
    masks = Masks.of(StepPlan(tuple(rows), is_constrained=True))
    assert masks is not None
    masks.fill()
    masks.wait()
    return masks


def random_logits(count: int, size: int = VOCAB) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sampler(logit_kernels: LogitKernels | None) -> Sampler:
    """A sampler in plain torch, and one with kernels."""
    return Sampler(VOCAB, frozenset(), kernels=logit_kernels)


def test_refused_tokens_and_those_beyond_the_masks_become_impossible() -> None:
    rows = [row(1, Allowing(0, 31, 32, 95)), row(2, None), row(3, Allowing(7))]
    constrained = [rows[0], rows[2]]
    logits = random_logits(2)
    before = logits.clone()
    rule_out(logits, mask_rows(constrained, filled(rows)))
    assert logits.isfinite().nonzero().tolist() == [*([0, token] for token in (0, 31, 32, 95)), [1, 7]]
    assert torch.equal(logits[logits.isfinite()], before[logits.isfinite()])


def test_masks_are_taken_in_any_order_of_rows() -> None:
    rows = [row(1, Allowing(0, 31)), row(2, None), row(3, Allowing(7))]
    assert mask_rows([rows[0], rows[2]], filled(rows)).tolist() == [[1 - 2**31, 0, 0], [128, 0, 0]]
    assert mask_rows([rows[2], rows[0]], filled(rows)).tolist() == [[128, 0, 0], [1 - 2**31, 0, 0]]


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "top_k": 3}, {"seed": 1, "top_p": 0.9}]
)
def test_a_token_is_drawn_from_those_that_the_mask_allows(sampler: Sampler, params: Any) -> None:
    rows = [row(i, Allowing(5, 50, 64), **params) for i in range(20)]
    rows = [r._replace(sample_index=i) for i, r in enumerate(rows)]
    results = sampler.sample(random_logits(20), rows, filled(rows))
    assert {result.tokens[0] for result in results} <= {5, 50, 64}
    raw = torch.log_softmax(random_logits(20).double(), -1)
    for i, result in enumerate(results):
        assert result.logprobs[0].logprob == pytest.approx(float(raw[i, result.tokens[0]]), abs=1e-5)


def test_neighbours_of_a_constrained_row_get_the_same_tokens(sampler: Sampler) -> None:
    rows = [row(i, None, seed=i) for i in range(4)]
    alone = sampler.sample(random_logits(4), rows)
    mixed = [*rows[:2], row(9, Allowing(3), seed=0), *rows[2:]]
    logits = torch.cat([random_logits(4)[:2], random_logits(1), random_logits(4)[2:]])
    results = sampler.sample(logits, mixed, filled(mixed))
    assert [*results[:2], *results[3:]] == alone
    assert results[2].tokens == (3,)


def test_logprobs_are_the_models_own_and_the_sampled_one_is_of_the_masked_draw(sampler: Sampler) -> None:
    rows = [row(1, Allowing(5), logprobs=2, seed=1)]
    (result,) = sampler.sample(random_logits(1), rows, filled(rows))
    raw = torch.log_softmax(random_logits(1)[0].double(), -1)
    entry = result.logprobs[0]
    assert entry.logprob == pytest.approx(float(raw[5]), abs=1e-5)
    assert entry.sampled == pytest.approx(0.0, abs=1e-6)
    assert [token for token, _, _ in entry.top] == raw.topk(2).indices.tolist()


@pytest.mark.parametrize(
    "rules", [{"allowed_token_ids": [6]}, {"bad_words": [[5]]}, {"min_tokens": 3, "max_tokens": 9}]
)
def test_a_row_whose_rules_leave_nothing_of_the_mask_fails_alone(sampler: Sampler, rules: Any) -> None:
    rows = [row(1, Allowing(5), **rules)._replace(stop_ids=frozenset({5})), row(2, Allowing(5))]
    results = sampler.sample(random_logits(2), rows, filled(rows))
    assert isinstance(results[0].error, RequestError)
    assert "no token is left to choose: structured_outputs" in str(results[0].error)
    assert results[1].tokens == (5,)


def test_a_processor_cannot_bring_back_what_the_mask_refuses(sampler: Sampler) -> None:
    rows = [row(1, Allowing(5, 6), temperature=0, logits_processors=[lambda output, logits: torch.zeros_like(logits)])]
    (result,) = sampler.sample(random_logits(1), rows, filled(rows))
    assert result.tokens == (5,)


def test_a_constraint_that_failed_is_its_rows_error(sampler: Sampler) -> None:
    error = GrammarError("out of fuel")
    rows = [row(1, Allowing(5, error=error)), row(2, Allowing(6))]
    results = sampler.sample(random_logits(2), rows, filled(rows))
    assert results[0].error is error
    assert results[1].tokens == (6,)


@pytest.fixture
def fast() -> Iterator[Sampler]:
    """A sampler with kernels."""
    if not native.available():
        pytest.skip("no compiler")
    kernels = native.Kernels(1)
    yield Sampler(VOCAB, frozenset(), kernels=LogitKernels(kernels, CHUNK))
    kernels.close()


@pytest.mark.parametrize("neighbour", [{"temperature": 0}, {"seed": 3}, {"temperature": 0, "logprobs": 2}])
def test_a_row_without_a_mask_takes_the_token_that_its_mask_would_give(fast: Sampler, neighbour: Any) -> None:
    """Its greatest logit, a later candidate, one beyond these, one of equals, none at all; constraints may fail."""
    logits = random_logits(8)
    order = logits.argsort(-1, descending=True).tolist()
    logits[4, [5, 9]] = 7.0
    logits[7, 3] = torch.nan
    error = GrammarError("out of fuel")
    allowed = [order[0][:1], order[1][5:6], [t for t in order[2][40:] if t < 96], [], [9, 5], [1], [2], [3]]
    constraints = [Allowing(*tokens, error=error if i == 5 else None) for i, tokens in enumerate(allowed)]
    rows = [row(i, constraint, temperature=0) for i, constraint in enumerate(constraints)]
    rows[5] = rows[5]._replace(constraint=Allowing(error=error))
    rows += [row(8, None, **neighbour), row(9, Allowing(4), **neighbour)]
    logits = torch.cat([logits, random_logits(2)])
    expected = Sampler(VOCAB, frozenset()).sample(logits, rows, filled(rows))
    results = fast.sample(logits, rows, filled(rows[9:]))
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert [type(result.error) for result in results] == [type(result.error) for result in expected]
    assert results[5].error is error
    assert results[4].tokens == (5,)
    assert constraints[0].asked == order[0][:1]
    assert constraints[2].asked == order[2][:16]
    assert not constraints[7].asked


def test_the_kernel_finds_the_same_tokens_and_errors_as_plain_torch(fast: Sampler) -> None:
    error = GrammarError("out of fuel")
    constraints = [Allowing(5, 70), None, Allowing(), Allowing(3, error=error), Allowing(*range(96)), Allowing(1)]
    rows = [row(i, constraint, temperature=0) for i, constraint in enumerate(constraints)]
    logits = random_logits(len(rows))
    logits[5, 4] = torch.nan
    expected = Sampler(VOCAB, frozenset()).sample(logits, rows, filled(rows))
    results = fast.sample(logits, rows, filled(rows))
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert [type(result.error) for result in results] == [type(result.error) for result in expected]
    assert results[3].error is error
    for result, other in zip(results, expected, strict=True):
        for entry, reference in zip(result.logprobs, other.logprobs, strict=True):
            assert entry.logprob == pytest.approx(reference.logprob, abs=1e-5)


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"min_p": 0.2},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 2.0},
    {"top_k": 3},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    {"top_k": 1200},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.5, "temperature": 0.9},
    {"logit_bias": {5: 3.0, 7: 9.0}, "top_p": 0.9},
    {"temperature": 0.0, "frequency_penalty": 1.0},
    {"logprobs": 2},
    {"logits_processors": [lambda output, logits: torch.full_like(logits, torch.nan)]},
]


@pytest.mark.parametrize("size", [VOCAB, 2880, 3001])
def test_kernels_draw_what_plain_torch_draws_under_every_mask(fast: Sampler, size: int) -> None:
    """Beside rows without a mask, whose neighbours they are in the same batch."""
    masks = [range(size // 33), range(size // 65, size // 2, 3), [5], [7, 70], [], range(10**3)]
    rows = []
    for way in WAYS:
        for tokens in [*masks, None]:
            allowed = None if tokens is None else AllowingOfMany(*(token for token in tokens if token < 2880))
            rows.append(row(len(rows), allowed, seed=len(rows), max_tokens=9, **way))
    logits = 3 * random_logits(len(rows), size)
    expected = Sampler(size, frozenset()).sample(logits, rows, filled(rows))
    results = fast.sample(logits, rows, filled(rows))
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert [str(result.error) for result in results] == [str(result.error) for result in expected]
    for result, other in zip(results, expected, strict=True):
        for entry, reference in zip(result.logprobs, other.logprobs, strict=True):
            assert entry.logprob == pytest.approx(reference.logprob, abs=2e-6)
            assert entry.sampled == pytest.approx(reference.sampled, abs=2e-6)
            assert (entry.rank, len(entry.top)) == (reference.rank, len(reference.top))


def test_a_masked_row_gets_the_same_bits_alone_and_beside_others(fast: Sampler) -> None:
    masks = [range(30, 2000), [5, 2000], range(64), None]
    ways = [way for way in WAYS if "logits_processors" not in way]
    rows = [
        row(i, None if tokens is None else AllowingOfMany(*tokens), seed=i, max_tokens=9, **way)
        for i, (way, tokens) in enumerate((way, tokens) for way in ways for tokens in masks)
    ]
    logits = random_logits(len(rows), 3000)
    together = fast.sample(logits, rows, filled(rows))
    for i, each in enumerate(rows):
        masks_of_one = None if each.constraint is None else filled([each])
        assert fast.sample(logits[i : i + 1], [each], masks_of_one) == [together[i]]

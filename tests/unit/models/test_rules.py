"""Every rule agrees with transformers' processor, and affects only the rows that use it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from penstock.errors import RequestError
from penstock.models.rules import (
    SequenceRules,
    TokenCounts,
    add_bias,
    allow_only,
    apply,
    completed_bad_words,
    has_rules,
    penalize,
    run_processor,
    suppress,
)
from penstock.sampling import SamplingParams
from penstock.step import Row

SIZE = 300
EOS = frozenset({2})


def row_of(tokens: Sequence[int], prompt_len: int = 3, stop_ids: frozenset[int] = frozenset(), **params: Any) -> Row:
    return Row(
        seq_id=0,
        tokens=list(tokens),
        start=len(tokens) - 1,
        end=len(tokens),
        blocks=array("i"),
        samples=True,
        params=SamplingParams(max_tokens=None, **params),
        prompt_len=prompt_len,
        stop_ids=stop_ids,
    )


def logits_of(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(seed)) * 4


def applied(logits: Tensor, *rows: Row) -> Tensor:
    logits = logits.clone()
    assert apply(logits, rows, [SequenceRules.of(row, EOS, logits.shape[1]) for row in rows]) == {}
    return logits


def pairs(*members: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rows, tokens = zip(*members, strict=True)
    return torch.tensor(rows), torch.tensor(tokens)


def test_bias_is_added_to_the_named_tokens_only() -> None:
    logits = torch.zeros(2, 3)
    add_bias(logits, *pairs((0, 1), (1, 2)), torch.tensor([2.5, -100.0]))
    assert logits.tolist() == [[0.0, 2.5, 0.0], [0.0, 0.0, -100.0]]


def test_a_bias_beyond_float32_stays_finite() -> None:
    logits = torch.zeros(1, 2)
    add_bias(logits, *pairs((0, 0), (0, 1)), torch.tensor([1e300, -1e300], dtype=torch.float64))
    assert logits.isfinite().all()


def test_only_allowed_tokens_keep_their_logits() -> None:
    logits = torch.ones(2, 4)
    allow_only(logits, torch.tensor([1]), *pairs((1, 0), (1, 3)))
    assert logits.tolist() == [[1.0] * 4, [1.0, -torch.inf, -torch.inf, 1.0]]


def test_suppressed_tokens_become_impossible() -> None:
    logits = torch.ones(2, 3)
    suppress(logits, *pairs((0, 1), (0, 1), (1, 0)))
    assert logits.tolist() == [[1.0, -torch.inf, 1.0], [-torch.inf, 1.0, 1.0]]


def test_penalties_by_hand() -> None:
    """Repetition 2 halves 4 and doubles -1; then frequency 0.5 per occurrence and presence 0.25 once, output only."""
    logits = torch.tensor([[4.0, -1.0, 3.0, 1.0]])
    penalize(
        logits,
        *pairs((0, 0), (0, 1), (0, 2)),
        torch.tensor([3, 1, 0]),
        torch.tensor([[2.0, 0.5, 0.25]]),
    )
    assert logits.tolist() == [[2.0 - 1.75, -2.0 - 0.75, 1.5, 1.0]]


@pytest.mark.parametrize(
    ("words", "tokens", "completed"),
    [
        ([[5]], [], [5]),
        ([[1, 2]], [0, 1], [2]),
        ([[1, 2]], [1, 0], []),
        ([[1, 2, 3], [2, 9], [4, 4]], [1, 2], [3, 9]),
        ([[1, 2, 3]], [2], []),
    ],
)
def test_a_bad_word_is_cut_before_its_last_token(
    words: list[list[int]], tokens: list[int], completed: list[int]
) -> None:
    assert completed_bad_words(words, tokens) == completed


def test_a_processor_may_write_in_place_or_return_another_tensor() -> None:
    logits = torch.zeros(3)
    run_processor(lambda output, row: row.add_(len(output)), [7, 7], logits)
    assert logits.tolist() == [2.0, 2.0, 2.0]
    run_processor(lambda output, row: torch.tensor([1, 2, 3], dtype=torch.float64), [], logits)
    assert logits.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("result", [None, [0.0, 0.0], torch.zeros(2), torch.zeros(1, 3)])
def test_a_processor_that_returns_another_shape_gets_an_error_with_both_shapes(result: object) -> None:
    with pytest.raises(RequestError, match=r"tensor of shape \(3,\)"):
        run_processor(lambda output, row: result, [], torch.zeros(3))


def test_a_processor_that_raises_is_named_and_its_error_kept() -> None:
    def faulty(output: Sequence[int], row: Tensor) -> Tensor:
        raise KeyError("oops")

    with pytest.raises(RequestError, match="faulty failed: KeyError: 'oops'") as caught:
        run_processor(faulty, [], torch.zeros(3))
    assert isinstance(caught.value.__cause__, KeyError)


def test_counts_follow_a_growing_sequence() -> None:
    counts, tokens = TokenCounts(10), [4, 4, 5]
    counts.update(tokens, prompt_len=3)
    assert dict(zip(counts.tokens, counts.counts, strict=True)) == {4: 0, 5: 0}
    tokens += [5, 6]
    counts.update(tokens, prompt_len=3)
    tokens += [6, 6, 99]
    counts.update(tokens, prompt_len=3)
    counts.update(tokens, prompt_len=3)
    assert dict(zip(counts.tokens, counts.counts, strict=True)) == {4: 0, 5: 1, 6: 3}


def test_a_draft_is_counted_only_while_it_is_a_draft() -> None:
    counts = TokenCounts(10)
    counts.update([4, 4, 5, 7], prompt_len=2)
    assert counts.with_draft([]) == (array("q", [4, 5, 7]), array("q", [0, 1, 1]))
    assert counts.with_draft([5, 9, 5, 4, 12, 9]) == (array("q", [4, 5, 7, 9]), array("q", [1, 3, 1, 2]))
    assert (counts.tokens, counts.counts) == (array("q", [4, 5, 7]), array("q", [0, 1, 1]))


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"min_tokens": 3},
        {"logit_bias": {1: 1.0}},
        {"bad_words": [[1]]},
        {"logits_processors": [lambda output, row: row]},
        {"allowed_token_ids": [1]},
        {"suppress_tokens": [1]},
        {"begin_suppress_tokens": [1]},
        {"no_repeat_ngram_size": 2},
        {"sequence_bias": {(1, 2): 1.0}},
        {"exponential_decay_length_penalty": (1, 1.1)},
        {"forced_bos_token_id": 1},
        {"forced_eos_token_id": 1},
    ],
)
def test_rows_with_rules_are_recognized(params: dict[str, Any]) -> None:
    assert has_rules(row_of([1, 2, 3, 4, 5], **params))
    assert not has_rules(row_of([1, 2, 3, 4, 5], temperature=0.3, top_k=4, top_p=0.2, min_p=0.1))


def test_min_tokens_stops_being_a_rule_once_reached() -> None:
    assert has_rules(row_of([1, 2, 3, 4], min_tokens=2))
    assert not has_rules(row_of([1, 2, 3, 4, 5], min_tokens=2))
    assert has_rules(row_of([1, 2, 3, 4], min_new_tokens=2))
    assert not has_rules(row_of([1, 2, 3, 4, 5], min_new_tokens=2))


def test_rules_touch_only_their_own_row() -> None:
    logits = logits_of(4)
    plain = row_of([1, 2, 3, 4])
    ruled = row_of(
        [1, 2, 3, 4],
        logit_bias={1: 5.0},
        allowed_token_ids=[1, 2, 3],
        bad_words=[[3]],
        min_tokens=5,
        repetition_penalty=1.3,
        logits_processors=[lambda output, row: row * 2],
    )
    result = applied(logits, plain, ruled, plain, plain)
    assert torch.equal(result[[0, 2, 3]], logits[[0, 2, 3]])
    assert result[1].isfinite().nonzero().flatten().tolist() == [1]


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    logits = logits_of(1)
    row = row_of(
        [1, 2, 999, 999],
        stop_ids=frozenset({SIZE, 10**9}),
        logit_bias={SIZE: 1.0, 10**9: -1.0},
        bad_words=[[SIZE], [999, SIZE + 5], [10**9]],
        min_tokens=9,
        repetition_penalty=2.0,
        frequency_penalty=1.0,
    )
    result = applied(logits, row)
    assert (result != logits)[0].nonzero().flatten().tolist() == [1, 2]
    assert result[0, 2] == -torch.inf


def test_allowing_only_ids_outside_the_vocabulary_leaves_nothing() -> None:
    assert applied(logits_of(1), row_of([1, 2, 3], allowed_token_ids=[SIZE])).isneginf().all()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_suppresses_eos_and_stop_ids(ignore_eos: bool) -> None:
    row = row_of([1, 2, 3, 4], stop_ids=frozenset({7, 8}), min_tokens=2, ignore_eos=ignore_eos)
    assert applied(logits_of(1), row)[0].isneginf().nonzero().flatten().tolist() == [2, 7, 8]


def reference(logits: Tensor, row: Row, processors: list[Any]) -> Tensor:
    """The logits of one row after transformers' processors, float32 [V]."""
    return LogitsProcessorList(processors)(torch.tensor([row.tokens]), logits[None].clone())[0]


CONTEXTS = [[5, 6, 7, 5, 5, 9], [1, 2, 3], [250, 251, 252, 253, 250, 251]]


def transformers_chain(row: Row) -> list[Any]:
    p = row.params
    chain: list[Any] = []
    if p.logit_bias:
        chain.append(SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in p.logit_bias.items()}))
    if p.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.bad_words:
        chain.append(NoBadWordsLogitsProcessor([list(word) for word in p.bad_words]))
    if p.min_tokens:
        stops = sorted(EOS | row.stop_ids)
        chain.append(MinNewTokensLengthLogitsProcessor(row.prompt_len, p.min_tokens, stops))
    if p.allowed_token_ids:
        chain.append(SuppressTokensLogitsProcessor(sorted(set(range(SIZE)) - set(p.allowed_token_ids))))
    return chain


RULES: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {5: 3.0, 17: -100.0, 251: 0.5}},
    "repetition": {"repetition_penalty": 1.7},
    "encouraged repetition": {"repetition_penalty": 0.6},
    "bad_words": {"bad_words": [[11], [5, 9, 3], [9, 4], [250, 251, 252], [1, 2, 3, 4, 5, 6, 7, 8]]},
    "min_tokens": {"min_tokens": 3},
    "allowed": {"allowed_token_ids": [1, 5, 9, 250, 299]},
}
RULES["bias and repetition"] = RULES["logit_bias"] | RULES["repetition"]
RULES["all"] = {name: value for rule in list(RULES.values()) for name, value in rule.items()}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_agrees_with_transformers(name: str) -> None:
    rows = [row_of(tokens, stop_ids=frozenset({20, 21}), **RULES[name]) for tokens in CONTEXTS]
    logits = logits_of(len(rows))
    ours = applied(logits, *rows)
    theirs = torch.stack([reference(logits[i], row, transformers_chain(row)) for i, row in enumerate(rows)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_each_row_of_a_batch_gets_its_own_rules() -> None:
    rows = [row_of(tokens, **params) for params in RULES.values() for tokens in CONTEXTS]
    logits = logits_of(len(rows), seed=1)
    theirs = torch.stack([reference(logits[i], row, transformers_chain(row)) for i, row in enumerate(rows)])
    torch.testing.assert_close(applied(logits, *rows), theirs, rtol=0, atol=1e-6)


def test_presence_and_frequency_follow_the_openai_formula() -> None:
    row = row_of([5, 6, 7, 5, 5, 9], presence_penalty=0.7, frequency_penalty=-0.3)
    logits = logits_of(1)
    expected = logits.clone()
    expected[0, 5] -= 0.7 - 2 * 0.3
    expected[0, 9] -= 0.7 - 0.3
    torch.testing.assert_close(applied(logits, row), expected, rtol=0, atol=1e-6)


def test_processors_see_the_output_and_what_the_other_rules_left() -> None:
    arguments: list[Any] = []

    def spy(output: list[int], row: Tensor) -> Tensor:
        arguments.append((output, row.dtype, tuple(row.shape), row[11].item()))
        return row

    applied(logits_of(1), row_of([1, 2, 3, 8, 9], bad_words=[[11]], logits_processors=[spy]))
    assert arguments == [([8, 9], torch.float32, (SIZE,), -torch.inf)]


def test_a_faulty_processor_is_reported_for_its_row_alone() -> None:
    def faulty(output: list[int], row: Tensor) -> Tensor:
        raise RuntimeError("no")

    rows = [row_of([1, 2, 3], **p) for p in ({}, {"logits_processors": [faulty]}, {"logit_bias": {0: 1.0}})]
    logits = logits_of(3)
    errors = apply(logits, rows, [SequenceRules.of(row, EOS, SIZE) for row in rows])
    assert list(errors) == [1]
    assert "no" in str(errors[1])
    assert torch.equal(logits[0], logits_of(3)[0])


class Panic(BaseException):
    """What a panic in a library of Rust arrives as."""


@pytest.mark.parametrize("error", [Panic("panic"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_a_processor_raises_ends_its_row_alone(error: BaseException) -> None:
    """A `BaseException` that is not an `Exception` failed the step of every request."""

    def faulty(output: list[int], row: Tensor) -> Tensor:
        raise error

    rows = [row_of([1, 2, 3]), row_of([1, 2, 3], logits_processors=[faulty])]
    logits = logits_of(2)
    sequences = [SequenceRules.of(row, EOS, SIZE) for row in rows]
    errors = apply(logits, rows, sequences)
    assert list(errors) == [1]
    assert "logits processor faulty failed" in str(errors[1])


def test_a_processor_without_a_name_or_a_message_is_named_by_its_type() -> None:
    class Sullen:
        def __getattr__(self, name: str) -> Any:
            raise Panic("no attributes")

        def __call__(self, output: list[int], row: Tensor) -> Tensor:
            raise Unprintable

    class Unprintable(Exception):
        def __str__(self) -> str:
            raise Panic("no text")

    with pytest.raises(RequestError, match="logits processor Sullen failed: Unprintable"):
        run_processor(Sullen(), [], torch.zeros(4))


@pytest.mark.parametrize(
    "result",
    [lambda row: row.double(), lambda row: row.half(), lambda row: row.requires_grad_(), lambda row: row.expand(SIZE)],
    ids=["double", "half", "with grad", "expanded"],
)
def test_a_processor_may_return_any_real_tensor_of_the_shape(result: Any) -> None:
    before = logits_of(1)
    logits = applied(before.clone(), row_of([1, 2, 3], logits_processors=[lambda output, row: result(row + 0)]))
    torch.testing.assert_close(logits, before, rtol=1e-2, atol=1e-2)
    assert not logits.requires_grad


def test_a_processor_gets_a_copy_of_its_row() -> None:
    """It was a view into memory that holds other requests' logits in the next step."""
    retained: list[Tensor] = []

    def keep(output: list[int], row: Tensor) -> Tensor:
        retained.append(row)
        row[5] = 9.0
        return row

    result = applied(logits_of(1), row_of([1, 2, 3], logits_processors=[keep]))
    assert result[0, 5] == 9.0
    retained[0].fill_(-1.0)
    assert result[0, 5] == 9.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_processor_cannot_change_the_modes_of_autograd_for_the_others(mode: Any) -> None:
    """It enabled gradients on the model's thread for good."""
    left_open: list[Any] = []

    def meddle(output: list[int], row: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        left_open.append(torch.inference_mode(False))
        left_open[-1].__enter__()
        return row

    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        run_processor(meddle, [], torch.zeros(4))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
        left_open.clear()  # it restores the modes of its block, so not after that

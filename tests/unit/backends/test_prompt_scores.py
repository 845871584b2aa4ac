"""From an engine's entries to a score, by hand."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np
import pytest

from penstock import ExecutionError, SamplingParams
from penstock.backends.prompt_scores import Scoring

LOGITS = [[0.0, 1.0, 2.0], [3.0, 3.0, 0.0]]  # in front of tokens 2 and 0, after a prompt of one token


@dataclass
class Flat:
    """vLLM's `FlatLogprobs`: at every place the token itself, then all tokens, the likeliest first."""

    token_ids: list[int]
    logprobs: list[float]
    start_indices: list[int]
    end_indices: list[int]

    def __len__(self) -> int:
        return len(self.start_indices)


def entries(rows: list[list[float]]) -> Flat:
    flat = Flat([], [], [0], [0])  # nothing of the first token
    for token, row in zip((2, 0), rows, strict=True):
        order = [token, *sorted(range(len(row)), key=lambda index: -row[index])]
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids += order
        flat.logprobs += [row[index] for index in order]
        flat.end_indices.append(len(flat.token_ids))
    return flat


def log_softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    total = log(sum(exp(value / temperature) for value in row))
    return [value / temperature - total for value in row]


def made_of(ids: list[int], params: SamplingParams | None, are_logits: bool, logits: bool, entropies: bool) -> Scoring:
    return Scoring.of(ids, params, are_logits=are_logits, logits=logits, entropies=entropies, engine="vLLM")


def scoring(params: SamplingParams | None = None, *, are_logits: bool, logits: bool, entropies: bool) -> Scoring:
    made = made_of([2, 0], params, are_logits, logits, entropies)
    ids, request = made.request([9])
    assert ids == [9, 2, 0]
    assert request.prompt_logprobs == -1
    made.entries = entries(LOGITS if are_logits else [log_softmax(row) for row in LOGITS])
    return made


@pytest.mark.parametrize("are_logits", [True, False])
def test_entropies_and_tempered_values_come_from_the_whole_vocabulary(are_logits: bool) -> None:
    params = SamplingParams(temperature=0.5)
    score = scoring(params, are_logits=are_logits, logits=are_logits, entropies=True).score()
    rows = [log_softmax(row) for row in LOGITS]
    np.testing.assert_allclose(score.logprobs, [rows[0][2], rows[1][0]], rtol=1e-6)
    tempered = [log_softmax(row, 0.5) for row in LOGITS]
    np.testing.assert_allclose(score.tempered, [tempered[0][2], tempered[1][0]], rtol=1e-6)
    np.testing.assert_allclose(score.entropies, [-sum(exp(x) * x for x in row) for row in rows], rtol=1e-6)
    if are_logits:
        np.testing.assert_array_equal(score.logits, np.array(LOGITS, np.float32))
    else:
        assert score.logits is None


def test_a_greedy_request_could_have_drawn_the_likeliest_token_only() -> None:
    score = scoring(SamplingParams(temperature=0), are_logits=True, logits=False, entropies=False).score()
    assert score.tempered.tolist() == [0.0, 0.0]
    other = made_of([0, 0], SamplingParams(temperature=0), True, False, False)
    other.request([9])
    other.entries = entries(LOGITS)
    assert other.score().tempered.tolist() == [-np.inf, 0.0]


def test_missing_entries_are_an_error() -> None:
    made = made_of([2, 0], None, False, False, False)
    made.request([9])
    with pytest.raises(ExecutionError, match="no log probabilities"):
        made.score()


def test_a_part_of_the_vocabulary_is_an_error() -> None:
    """What was missing was whatever the memory held before."""
    made = made_of([2, 0], None, False, False, True)
    made.request([9])
    made.entries = entries([log_softmax(row) for row in LOGITS])
    made.entries.end_indices[-1] -= 2
    with pytest.raises(ExecutionError, match="a part of the vocabulary"):
        made.score()

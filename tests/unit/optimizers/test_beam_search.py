"""Beam search by hand: which beginnings are kept, where they go, and when a search is over."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest

from penstock.errors import RequestError
from penstock.optimizers.beam_search import Beam, BeamSearch, Move, num_candidates, ranked, slots_for
from penstock.sampling import SamplingParams
from penstock.sequence import FinishReason
from penstock.step import TokenLogprobs

STOP = 9


def entries(**scores: float) -> tuple[TokenLogprobs, ...]:
    """Candidates named by letters: `a` is token 0; `z` is the stop token."""
    return tuple(
        TokenLogprobs(STOP if name == "z" else ord(name) - 97, score, score)
        for name, score in sorted(scores.items(), key=lambda item: -item[1])
    )


def search(width: int = 2, max_tokens: int = 10, matcher: Any = None, **options: Any) -> BeamSearch:
    values = {"use_beam_search": True, "best_of": width, "temperature": 0.0, "max_tokens": max_tokens} | options
    return BeamSearch(SamplingParams(**values), max_tokens, frozenset({STOP}), matcher)


def texts(beam_search: BeamSearch) -> list[tuple[list[int], float]]:
    return [([entry.token for entry in text.chain.entries()], text.score) for text in beam_search.hypotheses]


def test_twice_the_width_is_ranked_so_that_the_width_is_left_after_stops() -> None:
    assert [num_candidates(4, stops) for stops in (0, 1, 2)] == [8, 8, 12]


def test_continuations_are_ranked_by_what_they_and_their_beam_score() -> None:
    beams = {3: Beam(-1.0), 0: Beam(-2.0)}
    reports = {3: entries(a=-1.0, b=-5.0), 0: entries(a=0.0, b=-0.5)}
    assert [(candidate.score, candidate.slot) for candidate in ranked(beams, reports, 3)] == [
        (-2.0, 3),
        (-2.0, 0),
        (-2.5, 0),
    ]


def test_a_beam_keeps_its_slot_for_its_best_continuation() -> None:
    assert slots_for([1, 1, 2, 1], 4) == [1, 0, 2, 3]
    assert slots_for([0, 0, 0], 3) == [0, 1, 2]
    assert slots_for([2], 3) == [2]


def test_the_first_step_spreads_the_prompt_over_the_slots() -> None:
    beam_search = search(width=3)
    beam_search.report(0, entries(a=-1.0, b=-2.0, c=-3.0, d=-4.0))
    assert beam_search.is_ready
    assert beam_search.advance() == [Move(1, 0, 1), Move(2, 0, 2), Move(0, 0, 0)], "those that change their slot first"


def test_beams_are_replaced_by_the_continuations_of_better_ones() -> None:
    beam_search = search(width=2)
    beam_search.report(0, entries(a=-1.0, b=-2.0))
    beam_search.advance()
    beam_search.report(1, entries(a=-3.0))
    assert not beam_search.is_ready
    beam_search.report(0, entries(c=-0.1, d=-0.2))
    assert list(beam_search.reported) == [1, 0]
    assert beam_search.advance() == [Move(1, 0, 3), Move(0, 0, 2)]


def test_a_stop_token_ends_a_text_only_among_the_best() -> None:
    beam_search = search(width=2)
    beam_search.report(0, entries(a=-1.0, b=-2.0, z=-3.0))
    assert [move.token for move in beam_search.advance()] == [1, 0]
    assert texts(beam_search) == [], "third of two"
    beam_search.report(0, entries(z=-0.1, a=-1.0))
    beam_search.report(1, entries(a=-4.0))
    assert [move.token for move in beam_search.advance()] == [0, 0]
    assert texts(beam_search) == [([0, STOP], pytest.approx(-0.55))]


def test_min_tokens_makes_a_stop_token_one_like_any_other() -> None:
    beam_search = search(width=2, min_tokens=1)
    beam_search.report(0, entries(z=-1.0, a=-2.0))
    assert [move.token for move in beam_search.advance()] == [0, STOP]


def test_at_the_longest_every_one_of_the_best_is_complete() -> None:
    beam_search = search(width=2, max_tokens=1)
    beam_search.report(0, entries(a=-1.0, z=-1.5, b=-2.0))
    assert beam_search.advance() == []
    assert texts(beam_search) == [([0], -1.0), ([STOP], -1.5)]
    assert [(text.reason, text.stop) for text in beam_search.hypotheses] == [
        (FinishReason.LENGTH, None),
        (FinishReason.STOP, STOP),
    ]


def test_early_stopping_ends_with_the_last_of_the_width() -> None:
    for early_stopping, goes_on in ((True, False), (False, True)):
        beam_search = search(width=2, early_stopping=early_stopping, length_penalty=2.0)
        beam_search.report(0, entries(z=-1.0, a=-1.1))
        beam_search.advance()
        beam_search.report(0, entries(z=-5.0, b=-4.9))
        assert bool(beam_search.advance()) == goes_on


def test_without_early_stopping_a_search_ends_when_nothing_better_can_come() -> None:
    """After two texts of -1 and -3 a running sum of -6 is -3 per token at length 2, and -0.6 at length 10."""
    for early_stopping, goes_on in ((False, False), ("never", True)):
        beam_search = search(width=2, early_stopping=early_stopping)
        beam_search.report(0, entries(z=-1.0, a=-2.0))
        beam_search.advance()
        beam_search.report(0, entries(z=-4.0, a=-4.0))
        assert bool(beam_search.advance()) == goes_on
        assert [score for _, score in texts(beam_search)] == [-1.0, -3.0]


def test_fewer_continuations_than_slots_leave_slots_empty() -> None:
    beam_search = search(width=3)
    beam_search.report(0, entries(a=-1.0, b=-2.0, c=-3.0))
    beam_search.advance()
    beam_search.report(0, ())
    beam_search.report(1, entries(a=-1.0))
    beam_search.report(2, ())
    assert beam_search.advance() == [Move(1, 1, 0)]
    assert beam_search.outcome(0) is None


def test_a_search_without_continuations_is_over() -> None:
    beam_search = search()
    beam_search.report(0, entries(z=-1.0))
    assert beam_search.advance() == []
    assert len(beam_search.hypotheses) == 1


class Count:
    """Matches stop strings: the third `a` completes a stop string; `d` is no text at all."""

    def __init__(self, seen: int = 0) -> None:
        self.seen = seen

    def after(self, token: int) -> Count | None:
        if token == 3:
            raise RequestError("no text for d")
        seen = self.seen + (token == 0)
        return Count(seen) if seen < 3 else None


def test_a_stop_string_ends_the_beam_that_says_it() -> None:
    beam_search = search(width=2, matcher=Count())
    beam_search.report(0, entries(a=-0.1, b=-1.0))
    while beam_search.advance():
        for slot in range(2):
            beam_search.report(slot, entries(a=-0.1, b=-1.0))
    outputs = [text.chain.entries() for text in beam_search.hypotheses]
    assert [sum(entry.token == 0 for entry in text) for text in outputs] == [3, 3]
    assert {(text.reason, text.stop) for text in beam_search.hypotheses} == {(FinishReason.STOP, None)}


def test_errors_of_a_matcher_are_raised() -> None:
    beam_search = search(matcher=Count())
    beam_search.report(0, entries(d=-1.0))
    with pytest.raises(RequestError, match="no text"):
        beam_search.advance()


def model(tokens: tuple[int, ...]) -> dict[int, float]:
    """Some distribution over 4 tokens and the stop token that depends on all that came before."""
    weights = [1.0 + ((7 * sum((i + 2) * t for i, t in enumerate(tokens)) + 3 * token) % 11) for token in range(5)]
    return {STOP if token == 4 else token: math.log(weight / sum(weights)) for token, weight in enumerate(weights)}


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_search_as_wide_as_the_tree_finds_the_best_text_of_all(length_penalty: float) -> None:
    max_tokens, width = 4, 4**4
    beam_search = search(width, max_tokens, length_penalty=length_penalty, early_stopping="never")
    beams: dict[int, tuple[int, ...]] = {0: ()}
    while beams:
        for slot, tokens in beams.items():
            scored = sorted(model(tokens).items(), key=lambda item: -item[1])
            beam_search.report(slot, [TokenLogprobs(token, score, score) for token, score in scored])
        beams = {move.slot: (*beams[move.source], move.token) for move in beam_search.advance()}
    assert texts(beam_search)[0] == best_of_all(max_tokens, length_penalty)


def best_of_all(max_tokens: int, length_penalty: float) -> tuple[list[int], Any]:
    every: list[tuple[float, list[int]]] = []
    for length in range(1, max_tokens + 1):
        for tokens in product((0, 1, 2, 3, STOP), repeat=length):
            if STOP in tokens[:-1] or (length < max_tokens and tokens[-1] != STOP):
                continue
            total = sum(model(tokens[:i])[token] for i, token in enumerate(tokens))
            every.append((total / length**length_penalty, list(tokens)))
    score, text = max(every)
    return text, pytest.approx(score)

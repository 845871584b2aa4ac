"""The hand-over of masks, with a filler that allows the tokens it is told."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from penstock import ExecutionError, GrammarError, SamplingParams
from penstock.constraint import MaskRequest
from penstock.constraints.masks import Masks
from penstock.step import Row, StepPlan


@dataclass
class Filler:
    """Allows, in mask number i, token i alone."""

    num_words: int = 2
    errors: dict[int, GrammarError] = field(default_factory=dict)
    requests: list[MaskRequest] = field(default_factory=list)

    def fill(self, requests: Sequence[MaskRequest], bits: array[int]) -> Mapping[int, GrammarError]:
        self.requests += requests
        for mask in range(len(bits) // self.num_words):
            words = array("i", (1 << mask).to_bytes(4 * self.num_words, "little"))
            bits[mask * self.num_words : (mask + 1) * self.num_words] = words
        return self.errors


class Broken(Filler):
    def fill(self, requests: Sequence[MaskRequest], bits: array[int]) -> Mapping[int, GrammarError]:
        raise ZeroDivisionError("no masks")


@dataclass
class Held:
    """A constraint that nothing is asked of."""

    filler: Filler
    ends_itself: bool = False
    is_complete: bool = False
    prefers_candidates: bool = False

    def first_allowed(self, candidates: Sequence[int]) -> int | None:
        return None

    def advance(self, tokens: Sequence[int]) -> int:
        return len(tokens)

    def trim(self, draft: Sequence[int]) -> tuple[int, ...]:
        return tuple(draft)

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        return ()


def row(seq_id: int, constraint: Held | None, *, samples: bool = True, **fields: object) -> Row:
    plain = Row(seq_id, [1, 2], 1, 2, array("i"), samples, SamplingParams(), 1, constraint=constraint)
    return plain._replace(**fields)


def plan(*rows: Row) -> StepPlan:
    return StepPlan(rows, is_constrained=True)


def test_a_plan_without_rows_that_sample_under_a_constraint_has_no_masks() -> None:
    filler = Filler()
    assert Masks.of(StepPlan((row(1, None),))) is None
    assert Masks.of(plan(row(1, None), row(2, Held(filler), samples=False))) is None


def test_drafts_and_siblings_have_masks_of_their_own() -> None:
    filler = Filler()
    held = [Held(filler) for _ in range(4)]
    siblings = (row(5, held[2]), row(6, None))
    rows = row(1, held[0], draft=(7, 8)), row(2, None), row(3, held[1], siblings=siblings), row(4, held[3])
    masks = Masks.of(plan(*rows))
    assert masks is not None
    masks.fill()
    masks.wait()
    expected = [MaskRequest(held[0], 0, (7, 8)), *(MaskRequest(held[i], i + 2) for i in (1, 2, 3))]
    assert filler.requests == expected
    assert [masks.index(rows[0]._replace(draft=(7, 8)[:length])) for length in range(3)] == [0, 1, 2]
    assert [masks.index(r) for r in (rows[2], siblings[0], rows[3])] == [3, 4, 5]


def test_rows_are_left_out_where_candidates_are_checked_and_their_constraints_prefer_that() -> None:
    filler = Filler()
    greedy, open_one = SamplingParams(temperature=0), Held(filler, prefers_candidates=True)
    rows = [
        row(1, open_one, params=greedy),
        row(2, Held(filler), params=greedy),
        row(3, open_one, params=SamplingParams(temperature=1)),
        row(4, open_one, params=greedy, draft=(7,)),
        row(5, open_one, params=SamplingParams(temperature=0, presence_penalty=1)),
        row(6, open_one, params=SamplingParams(temperature=0, min_tokens=3)),
        row(7, open_one, params=SamplingParams(top_k=1)),
    ]
    masks = Masks.of(plan(*rows), checks_candidates=True)
    assert masks is not None
    assert [masks.has(r) for r in rows] == [False, True, True, True, True, True, False]
    everything = Masks.of(plan(*rows))
    assert everything is not None
    assert all(map(everything.has, rows))
    assert Masks.of(plan(rows[0], rows[6]), checks_candidates=True) is None


def test_the_nearest_token_is_the_wished_or_the_first_that_is_allowed() -> None:
    masks = Masks.of(plan(row(1, Held(Filler()), draft=(7,) * 40)))
    assert masks is not None
    masks.fill()
    masks.wait()
    member = row(1, Held(Filler()), draft=())
    assert [masks.nearest(member, place, 3) for place in (3, 4, 31, 32, 40)] == [3, 4, 31, 32, 40]
    assert masks.nearest(member, 33, 10**6) == 33


def test_waiting_ends_once_the_masks_are_filled() -> None:
    masks = Masks.of(plan(row(1, Held(Filler()))))
    assert masks is not None
    waiting, done = threading.Event(), threading.Event()

    def wait() -> None:
        waiting.set()
        masks.wait()
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(10)
    assert not done.is_set()
    masks.fill()
    assert done.wait(10)
    thread.join()


def test_an_error_belongs_to_its_row() -> None:
    error = GrammarError("out of fuel")
    filler = Filler(errors={1: error})
    rows = row(1, Held(filler)), row(2, Held(filler))
    masks = Masks.of(plan(*rows))
    assert masks is not None
    masks.fill()
    assert [masks.error(r) for r in rows] == [None, error]


def test_a_fault_of_the_filler_reaches_the_one_who_waits() -> None:
    masks = Masks.of(plan(row(1, Held(Broken()))))
    assert masks is not None
    masks.fill()
    with pytest.raises(ExecutionError, match="ZeroDivisionError: no masks"):
        masks.wait()

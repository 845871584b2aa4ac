"""The output of one request is a draft for the others of its namespace, within bounded memory."""

from __future__ import annotations

import tracemalloc

import pytest

from penstock.optimizers.speculation.drafter import Draft
from penstock.optimizers.speculation.suffix import GeneratedTexts, SuffixDrafter
from tests.unit.optimizers.speculation.drafting import propose, sequence


def test_another_request_generated_it_before() -> None:
    drafter = SuffixDrafter()
    propose(drafter, sequence(0, [1, 2], [3, 4, 5, 6, 7, 8]))
    assert propose(drafter, sequence(1, [9, 9], [3, 4])).tokens == (5, 6, 7, 8)


def test_the_first_tokens_after_a_prompt_are_found_by_its_last_ones() -> None:
    drafter = SuffixDrafter()
    propose(drafter, sequence(0, [1, 2, 3], [4, 5, 6]))
    assert propose(drafter, sequence(1, [8, 2, 3])).tokens == (4, 5, 6)


def test_prompts_are_not_shared() -> None:
    drafter = SuffixDrafter()
    propose(drafter, sequence(0, [1, 2, 3, 4, 5, 6], [7]))
    assert propose(drafter, sequence(1, [9, 1, 2])) == Draft()


def test_namespaces_share_nothing() -> None:
    drafter = SuffixDrafter()
    propose(drafter, sequence(0, [1], [3, 4, 5, 6], namespace="a"))
    assert propose(drafter, sequence(1, [1], [3, 4], namespace="b")) == Draft()
    assert propose(drafter, sequence(2, [1], [3, 4], namespace="a")).tokens == (5, 6)


def test_its_own_text_is_used_too_and_the_longer_match_counts() -> None:
    drafter = SuffixDrafter()
    propose(drafter, sequence(0, [1], [3, 4, 5, 5]))
    assert propose(drafter, sequence(1, [3, 4, 6, 6, 9], [3, 4])).tokens[:2] == (6, 6), "of equals, its own"
    propose(drafter, sequence(2, [1], [8, 3, 4, 7, 7]))
    assert propose(drafter, sequence(3, [3, 4, 6, 6], [8, 3, 4])).tokens == (7, 7)


def test_two_live_requests_help_each_other() -> None:
    drafter = SuffixDrafter()
    first, second = sequence(0, [1], [2]), sequence(1, [1], [2])
    assert propose(drafter, first) == Draft()
    first.tokens.extend([3, 4, 5])
    propose(drafter, first)
    assert propose(drafter, second).tokens == (3, 4, 5)
    second.tokens.extend([3, 4, 5])
    first.tokens.extend([6, 7])
    propose(drafter, first)
    assert propose(drafter, second).tokens == (6, 7)


def test_the_last_output_of_an_ended_request_is_kept() -> None:
    drafter = SuffixDrafter()
    seq = sequence(0, [1], [2])
    propose(drafter, seq)
    seq.tokens.extend([3, 4, 5])
    drafter.forget(0)
    assert propose(drafter, sequence(1, [1], [2, 3])).tokens == (4, 5)


def test_the_text_that_helped_least_lately_goes_first() -> None:
    drafter = SuffixDrafter(capacity=34)
    for number in range(3):
        propose(drafter, sequence(number, [1], [10 * number + place for place in range(10, 19)]))
        drafter.forget(number)
    assert drafter.num_tokens == 30
    assert propose(drafter, sequence(9, [1], [10, 11]), max_tokens=1).tokens == (12,)
    drafter.forget(9)
    propose(drafter, sequence(10, [1], [80, 81, 82, 83, 84]))
    assert drafter.num_tokens <= 34
    assert propose(drafter, sequence(11, [1], [20, 21])) == Draft()
    assert propose(drafter, sequence(12, [1], [10, 11]), max_tokens=1).tokens == (12,)


def test_a_live_request_that_was_dropped_begins_anew() -> None:
    drafter = SuffixDrafter(capacity=8)
    seq = sequence(0, [1], [2, 3, 4])
    propose(drafter, seq)
    propose(drafter, sequence(1, [1], [20, 21, 22, 23, 24, 25]))
    seq.tokens.extend([5, 6, 7, 8])
    propose(drafter, seq)
    seq.tokens.append(9)
    propose(drafter, seq)
    assert drafter.num_tokens <= 8
    assert propose(drafter, sequence(2, [1], [5, 6])).tokens == (7, 8, 9)


@pytest.mark.parametrize("same", [False, True], ids=["a namespace each", "one namespace"])
def test_texts_that_were_dropped_cost_no_memory(same: bool) -> None:
    """The index of every namespace there ever was stayed."""
    texts = GeneratedTexts(capacity=10)

    def visit(first: int, last: int) -> int:
        for number in range(first, last):
            tokens = [10 * number + place for place in range(5)]
            texts.grow(texts.open("" if same else f"tenant {number}", tokens))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = visit(0, 50)
        assert visit(50, 550) - before < 500 * 50
    finally:
        tracemalloc.stop()
    assert texts.num_tokens == 10

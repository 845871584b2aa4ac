from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from penstock.errors import GrammarError
from penstock.scheduling.acceptance import constrain
from penstock.sequence import FinishReason


@dataclass
class Counting:
    """A constraint that is complete after `size` tokens."""

    size: int
    ends_itself: bool = False
    filler: Any = None
    prefers_candidates: bool = False
    taken: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.taken) >= self.size

    def advance(self, tokens: Sequence[int]) -> int:
        if 13 in tokens:
            raise GrammarError("13 may not follow")
        count = min(len(tokens), self.size - len(self.taken)) if self.ends_itself else len(tokens)
        self.taken += tokens[:count]
        return count

    def trim(self, draft: Sequence[int]) -> tuple[int, ...]:
        return tuple(draft)

    def first_allowed(self, candidates: Sequence[int]) -> int | None:
        return None

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        return ()


def test_an_incomplete_output_goes_on() -> None:
    assert constrain(Counting(5), [1, 2], None, None) == (2, None, None, None)


@pytest.mark.parametrize("reason", [None, FinishReason.LENGTH])
def test_the_token_that_completes_an_output_ends_it_where_no_eos_does(reason: FinishReason | None) -> None:
    constraint = Counting(2, ends_itself=True)
    assert constrain(constraint, [1, 2, 3], reason, None) == (2, FinishReason.STOP, None, None)
    assert constraint.taken == [1, 2]


def test_a_complete_output_waits_for_eos_unless_its_length_is_reached() -> None:
    assert constrain(Counting(2), [1, 2], None, None) == (2, None, None, None)
    assert constrain(Counting(2), [1, 2], FinishReason.LENGTH, None) == (2, FinishReason.STOP, None, None)
    assert constrain(Counting(3), [1, 2], FinishReason.LENGTH, None) == (2, FinishReason.LENGTH, None, None)


def test_a_stop_token_stays_the_reason() -> None:
    assert constrain(Counting(1), [1, 9], FinishReason.STOP, 9) == (2, FinishReason.STOP, 9, None)


def test_a_token_that_may_not_follow_ends_the_sequence_with_the_error() -> None:
    count, reason, stop_token, error = constrain(Counting(5), [1, 13], None, None)
    assert (count, reason, stop_token) == (0, FinishReason.ERROR, None)
    assert str(error) == "13 may not follow"

"""Which steps are remembered, and how far they scatter."""

from __future__ import annotations

import pytest

from penstock.optimizers.tuning.window import LIKE, MIXED, PLAIN, SCATTER, Window
from tests.unit.optimizers.tuning.test_step_costs import step


def test_prompts_do_not_push_out_steps_of_streams_alone() -> None:
    window = Window()
    for _ in range(3):
        window.add(step(2))
    for _ in range(10 * MIXED):
        window.add(step(2, 10))
    assert len(window.records()) == MIXED + 3
    assert [record.prompt_tokens for record in window.records()[:4]] == [0, 0, 0, 10]
    assert window.since_plain == 10 * MIXED
    for _ in range(10 * PLAIN):
        window.add(step(2))
    assert len(window.records()) == MIXED + PLAIN
    assert window.since_plain == 0


def test_steps_are_compared_with_those_of_their_kind_before_them() -> None:
    window = Window()
    for _ in range(LIKE):
        window.add(step(2))
        window.add(step(2, 40))
    assert not window.scatter
    window.add(step(2, 40, noise=1.5))
    window.add(step(2))
    assert list(window.scatter) == pytest.approx([1.5, 1.0])


def test_what_no_stream_waited_for_does_not_count() -> None:
    window = Window()
    for _ in range(2 * LIKE):
        window.add(step(0, 500))
    assert not window.scatter
    for _ in range(2 * SCATTER):
        window.add(step(1))
    assert len(window.scatter) == SCATTER

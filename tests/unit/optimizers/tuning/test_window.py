"""Which steps the window holds, and how their times scatter."""

from __future__ import annotations

import pytest

from penstock.optimizers.tuning.window import NUM_MIXED, NUM_PLAIN, NUM_SCATTER, NUM_SIMILAR, StepWindow
from tests.unit.optimizers.tuning.test_step_costs import step


def test_prompts_do_not_push_out_steps_of_streams_alone() -> None:
    window = StepWindow()
    for _ in range(3):
        window.add(step(2))
    for _ in range(10 * NUM_MIXED):
        window.add(step(2, 10))
    assert len(window.records()) == NUM_MIXED + 3
    assert [record.prompt_tokens for record in window.records()[:4]] == [0, 0, 0, 10]
    assert window.steps_since_plain == 10 * NUM_MIXED
    for _ in range(10 * NUM_PLAIN):
        window.add(step(2))
    assert len(window.records()) == NUM_MIXED + NUM_PLAIN
    assert window.steps_since_plain == 0


def test_steps_are_compared_with_those_of_their_kind_before_them() -> None:
    window = StepWindow()
    for _ in range(NUM_SIMILAR):
        window.add(step(2))
        window.add(step(2, 40))
    assert not window.scatter
    window.add(step(2, 40, noise=1.5))
    window.add(step(2))
    assert list(window.scatter) == pytest.approx([1.5, 1.0])


def test_steps_without_streams_do_not_count() -> None:
    window = StepWindow()
    for _ in range(2 * NUM_SIMILAR):
        window.add(step(0, 500))
    assert not window.scatter
    for _ in range(2 * NUM_SCATTER):
        window.add(step(1))
    assert len(window.scatter) == NUM_SCATTER

"""Speculation that loses time is paused, for longer each time, and tried again."""

from __future__ import annotations

import pytest

from penstock.optimizers.speculation.backoff import Backoff


def steps_until_pause(backoff: Backoff, saving: float, max_steps: int = 100_000) -> int | None:
    for step in range(1, max_steps + 1):
        backoff.record(saving)
        if not backoff.allows_step():
            return step
    return None


def pause(backoff: Backoff) -> int:
    count = 1
    while not backoff.allows_step():
        count += 1
    return count


def test_what_saves_time_is_never_paused() -> None:
    assert steps_until_pause(Backoff(4.0, 100, 400), saving=0.01, max_steps=5000) is None


def test_a_pause_begins_once_the_limit_is_lost() -> None:
    assert steps_until_pause(Backoff(4.0, 100, 400), saving=-1.0) == 5


def test_a_loss_too_small_to_notice_causes_no_pause() -> None:
    assert steps_until_pause(Backoff(4.0, 100, 400), saving=-0.009, max_steps=5000) is None


def test_pauses_double_up_to_the_longest() -> None:
    backoff, pauses = Backoff(1.0, 10, 40), []
    for _ in range(4):
        steps_until_pause(backoff, saving=-1.0)
        pauses.append(pause(backoff))
    assert pauses == pytest.approx([10, 20, 40, 40], abs=1)


def test_success_makes_the_next_pause_short_again() -> None:
    backoff = Backoff(1.0, 10, 40)
    for _ in range(3):
        steps_until_pause(backoff, saving=-1.0)
        pause(backoff)
    backoff.record(5.0)
    steps_until_pause(backoff, saving=-1.0)
    assert pause(backoff) == pytest.approx(10, abs=1)


def test_gains_pay_for_losses_up_to_the_limit() -> None:
    backoff = Backoff(4.0, 100, 400)
    for _ in range(50):
        backoff.record(3.0)
    assert steps_until_pause(backoff, saving=-1.0) == 8

"""What loses time rests, for longer each time, and is tried again."""

from __future__ import annotations

import pytest

from penstock.optimizers.speculation.trial import Trial


def steps_until_rest(trial: Trial, saved: float, most: int = 100_000) -> int | None:
    for step in range(1, most + 1):
        trial.record(saved)
        if not trial.may_go_on():
            return step
    return None


def rest(trial: Trial) -> int:
    count = 1
    while not trial.may_go_on():
        count += 1
    return count


def test_what_saves_time_goes_on() -> None:
    assert steps_until_rest(Trial(4.0, 100, 400), saved=0.01, most=5000) is None


def test_a_loss_ends_it_after_so_much() -> None:
    assert steps_until_rest(Trial(4.0, 100, 400), saved=-1.0) == 5


def test_a_loss_too_small_to_notice_is_borne() -> None:
    assert steps_until_rest(Trial(4.0, 100, 400), saved=-0.009, most=5000) is None


def test_rests_double_up_to_the_longest() -> None:
    trial, rests = Trial(1.0, 10, 40), []
    for _ in range(4):
        steps_until_rest(trial, saved=-1.0)
        rests.append(rest(trial))
    assert rests == pytest.approx([10, 20, 40, 40], abs=1)


def test_success_makes_the_next_rest_short_again() -> None:
    trial = Trial(1.0, 10, 40)
    for _ in range(3):
        steps_until_rest(trial, saved=-1.0)
        rest(trial)
    trial.record(5.0)
    steps_until_rest(trial, saved=-1.0)
    assert rest(trial) == pytest.approx(10, abs=1)


def test_what_was_won_pays_for_losses_within_bounds() -> None:
    trial = Trial(4.0, 100, 400)
    for _ in range(50):
        trial.record(3.0)
    assert steps_until_rest(trial, saved=-1.0) == 8

"""How long waiting requests are told to wait, against how long they do, in steps of known length on a virtual clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from penstock.scheduling.forecast import Forecast
from penstock.sequence import FinishReason
from penstock.step import StepRecord, StepResult, record_of
from tests.unit.scheduling.world import World

STEP_S, TOKEN_S = 0.01, 0.0001


class Line(World):
    """A scheduler whose steps take known times; `starts` counts who has left the queue."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(400, 4, **settings)
        self.now = 0.0
        self.starts = 0
        self.lengths: dict[int, int] = {}  # where sequences stop by themselves
        self.forecast = Forecast(self.scheduler, lambda: self.now)

    def queue(self, count: int, length: Callable[[int], int], prompt: int = 8, room: int | None = None) -> None:
        """Add sequences of these lengths, which may be `room` long."""
        first = len(self.lengths)
        for number in range(first, first + count):
            self.lengths[number] = length(number)
            self.add(number, prompt, room or self.lengths[number], now=self.now)

    def run(self, steps: int = 1) -> None:
        """Take steps, each of which takes its time."""
        for _ in range(steps):
            self.begin(self.now)
            self.starts += len(self.scheduler.take_started())
            result = self.model()
            seconds = STEP_S + TOKEN_S * self.plan.num_tokens
            events = self.scheduler.commit(self.plan, result)
            self.now += seconds
            self.forecast.record(record_of(self.plan, result, events, seconds, self.scheduler.num_waiting))
            for event in events:
                seq = self.scheduler.get(event.seq_id)
                if seq is not None and seq.num_generated >= self.lengths[seq.id]:
                    self.stop(seq.id)

    def model(self) -> StepResult:
        """Whatever samples says something."""
        return StepResult(tuple(self.result_of(row, {}) for row in self.plan.rows))

    def stop(self, seq_id: int) -> None:
        """It would have gone on."""
        self.scheduler.finish(seq_id, FinishReason.STOP)

    def really_s(self, count: int) -> float:
        """How long it takes until so many more have started."""
        begin, num_started = self.now, self.starts + count
        while self.starts < num_started:
            self.run()
        return self.now - begin


def honest(told_s: float | None, really_s: float) -> bool:
    """Within a factor of 2, or a step."""
    assert told_s is not None
    return really_s / 2 - STEP_S <= told_s <= really_s * 2 + STEP_S


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
@pytest.mark.parametrize("steps", [1, 3, 30, 95])
def test_right_after_the_start_progress_tells(steps: int, count: int) -> None:
    """What had left the queue at once, because there was room, made it say 0.05 s."""
    line = Line(max_batch_size=4)
    line.queue(20, lambda number: 100)
    line.run(steps)
    estimate = line.forecast.wait_s(count, 8.0 * count)
    assert honest(estimate, line.really_s(count))


@pytest.mark.parametrize("seed", range(4))
def test_requests_of_many_lengths_leave_as_told(seed: int) -> None:
    line, draw = Line(max_batch_size=8), random.Random(seed)
    line.queue(120, lambda number: draw.randint(5, 60))
    line.run(70)
    for count in (1, 2, 6, 12, 12):
        estimate = line.forecast.wait_s(count, 8.0 * count)
        assert honest(estimate, line.really_s(count))


def test_requests_that_stop_early_leave_as_those_before_them_did() -> None:
    line = Line(max_batch_size=4)
    line.queue(60, lambda number: 20, room=200)
    line.run(40)
    for count in (1, 3, 9):
        estimate = line.forecast.wait_s(count, 8.0 * count)
        assert honest(estimate, line.really_s(count))


def test_where_prompts_fill_the_steps_their_tokens_tell() -> None:
    line = Line(max_batch_size=64, max_num_batched_tokens=32)
    line.queue(40, lambda number: 30, prompt=24)
    line.run(3)
    for count in (1, 4, 8):
        estimate = line.forecast.wait_s(count, 24.0 * count)
        assert honest(estimate, line.really_s(count))


def test_prompts_of_running_requests_that_are_not_computed_yet_count() -> None:
    line = Line(max_batch_size=1, max_num_batched_tokens=32)
    line.queue(6, lambda number: 4, prompt=320)
    line.run(3)
    estimate = line.forecast.wait_s(1, 320.0)
    assert honest(estimate, line.really_s(1))


def test_where_memory_is_short_the_running_ones_tell() -> None:
    line = Line(max_batch_size=64)
    line.queue(60, lambda number: 30, prompt=90)  # some 17 of them fit
    line.run(12)
    estimate = line.forecast.wait_s(1, 90.0)
    assert honest(estimate, line.really_s(1))


def test_where_there_is_room_the_next_step_is_told() -> None:
    line = Line(max_batch_size=8)
    line.queue(2, lambda number: 50)
    line.run(5)
    line.queue(3, lambda number: 50)
    assert honest(line.forecast.wait_s(1, 8.0), line.really_s(1))


def test_nothing_is_told_before_a_step_was_measured() -> None:
    line = Line()
    line.queue(3, lambda number: 5)
    assert line.forecast.wait_s(1, 8.0) is None


def test_a_stall_counts() -> None:
    line = Line(max_batch_size=1)
    line.queue(2, lambda number: 10)
    line.run(5)
    before = line.forecast.wait_s(1, 8.0)
    assert before is not None
    line.now += 3.0
    after = line.forecast.wait_s(1, 8.0)
    assert after is not None
    assert 2.5 < after - before < 3.5


def test_static_batches_end_before_anybody_else_starts() -> None:
    line = Line(max_batch_size=4)
    line.forecast = Forecast(line.scheduler, lambda: line.now, static=True)
    line.queue(8, lambda number: 20 + 10 * (number % 4))
    line.run(5)
    estimate = line.forecast.wait_s(1, 8.0)
    assert estimate == pytest.approx(45 * STEP_S, rel=0.2)


def test_a_thread_that_asks_while_the_first_step_is_recorded_gets_an_answer() -> None:
    """The step was known before its time was, and the median of no times is an error: the caller got that."""
    line, estimates = Line(), list[float | None]()
    fresh = Forecast(line.scheduler, lambda: line.now)

    class Record(StepRecord):
        """Another thread asks at the moment at which its time is read."""

        @property
        def seconds(self) -> float:
            """Ask, then say."""
            estimates.append(fresh.wait_s(1, 8.0))
            return STEP_S

    line.queue(6, lambda number: 4)
    line.run()
    record = record_of(line.plan, line.model(), [], STEP_S, line.scheduler.num_waiting)
    fresh.record(Record(*record))
    assert estimates == [None]
    assert fresh.wait_s(1, 8.0) is not None


def test_a_list_of_all_sequences_stays_as_it_is_while_others_arrive() -> None:
    """Callers' threads read it: "dictionary changed size during iteration" instead of an `EngineOverloaded`."""
    line = Line()
    line.queue(1, lambda number: 4)
    before = line.scheduler.sequences()
    line.queue(1, lambda number: 4)
    assert [seq.id for seq in before] == [0]

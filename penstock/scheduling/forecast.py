"""`Forecast`: estimates when waiting requests start, from the progress of the running ones and recent step times.

Owns the times of the latest steps, recorded after each by the engine's thread. Changes nothing. `wait_s` is called on
the threads of callers that were refused, so rarely; sequences are read at most once per step for it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from statistics import fmean, median

from penstock.scheduling.limits import StepLimits
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence, Status
from penstock.step import StepRecord

_WINDOW = 64  # steps


@dataclass(frozen=True, slots=True)
class _Outlook:
    """The state of all sequences, in steps.

    `ends`: when the running sequences will end, ascending. `durations`: how long the waiting ones will run, in order of
    arrival. `width`: sequences per waiting request. `num_free`: sequences that could start at once.
    """

    ends: list[float]
    durations: list[float]
    width: float
    num_free: int


@dataclass(frozen=True, slots=True)
class _Usage:
    """Which fraction of `max_tokens` ended sequences used: `fractions` ascending, `means[i]` of those from i on."""

    fractions: list[float]
    means: list[float]

    @classmethod
    def of(cls, fractions: list[float]) -> _Usage:
        """The statistics of these fractions."""
        fractions = sorted(fractions)
        totals = list(accumulate(reversed(fractions)))
        means = [total / count for count, total in enumerate(totals, 1)][::-1]
        return cls(fractions, [*means, 1.0])

    def remaining(self, seq: Sequence) -> float:
        """Expected tokens yet to generate, by the ended sequences that came at least as far as this one."""
        num_allowed, num_generated = max(1, seq.max_len - seq.prompt_len), seq.num_generated
        mean = self.means[bisect_right(self.fractions, num_generated / num_allowed)]
        return max(1.0, mean * num_allowed - num_generated)


class Forecast:
    """With `static` batches, all running sequences end before another one starts. `clock` gives seconds."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float], static: bool = False) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._static = static
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._drafting: deque[tuple[int, int]] = deque(maxlen=_WINDOW)  # (tokens generated, streams) of a step
        self._record: StepRecord | None = None  # of the latest step
        self._recorded_s = 0.0
        self._latest: tuple[StepRecord, _Outlook] | None = None

    def record(self, record: StepRecord) -> None:
        """A step has just ended."""
        self._seconds.append(record.seconds)
        if record.tokens - record.prompt_tokens > record.streams:
            self._drafting.append((record.generated, record.streams))
        self._recorded_s = self._clock()
        self._record = record  # from here on another thread may ask

    def wait_s(self, num_requests: int, num_tokens: float) -> float | None:
        """Seconds until so many waiting requests, of so many prompt tokens, have started; None before the first step.

        Running sequences are expected to use as much of their `max_tokens` as those that ended.
        """
        record = self._record
        if record is None:
            return None
        step_s = self._step_s()
        limits = self._scheduler.limits.resolve()
        outlook = self._outlook(record, limits)
        steps = self._steps(outlook, num_requests, num_tokens, limits.step_tokens)
        if not outlook.ends:
            return steps * step_s
        elapsed_s = self._clock() - self._recorded_s
        return (steps - 1) * step_s + (step_s - elapsed_s if elapsed_s < step_s else elapsed_s)  # a stall counts

    def _step_s(self) -> float:
        """Seconds per step: the mean of a full window, or else the median, because the first steps are prefills."""
        seconds = list(self._seconds)
        return fmean(seconds) if len(seconds) == _WINDOW else median(seconds)

    def _steps(self, outlook: _Outlook, num_requests: int, num_tokens: float, step_tokens: int) -> float:
        """Steps until the last of these requests has started: there is a place for it, and earlier prompts have run."""
        prompt_steps = num_tokens / max(1, step_tokens - len(outlook.ends))
        if self._static and outlook.ends:
            return outlook.ends[-1]
        num_earlier = int((num_requests - 1) * outlook.width)
        places = [1.0] * min(outlook.num_free, 1 + num_earlier) + outlook.ends  # ascending, and so a heap
        if not places:
            return max(1.0, prompt_steps)
        for duration in islice(cycle(outlook.durations or [1.0]), num_earlier):
            heapq.heapreplace(places, places[0] + duration)
        return max(places[0], prompt_steps)

    def _outlook(self, record: StepRecord, limits: StepLimits) -> _Outlook:
        latest = self._latest
        if latest is None or latest[0] is not record:
            latest = self._latest = record, self._new_outlook(record, limits)
        return latest[1]

    def _new_outlook(self, record: StepRecord, limits: StepLimits) -> _Outlook:
        sequences = self._scheduler.sequences()
        running = [seq for seq in sequences if seq.status is Status.RUNNING]
        waiting = [seq for seq in sequences if seq.status is Status.WAITING]
        pace, usage = self._pace(), _Usage.of(self._scheduler.used_fractions)
        prefill_steps = sum(map(_backlog, running)) / limits.step_tokens
        ends = sorted(usage.remaining(seq) / pace + (prefill_steps if _backlog(seq) else 0.0) for seq in running)
        durations = [usage.remaining(seq) / pace for seq in waiting]
        width = len(waiting) / max(1, len({seq.request_id for seq in waiting}))
        # A sequence that still waited although the step had rows and tokens left lacked blocks.
        has_spare = record.rows < limits.max_running and record.tokens < limits.step_tokens
        num_free = 0 if record.waiting > 0 and has_spare else max(0, limits.max_running - len(running))
        return _Outlook(ends, durations, max(1.0, width), num_free)

    def _pace(self) -> float:
        """Tokens of a stream per step; more than one where drafts are accepted."""
        counts = list(self._drafting)
        num_generated, num_streams = sum(count for count, _ in counts), sum(count for _, count in counts)
        return max(1.0, num_generated / num_streams) if num_streams else 1.0


def _backlog(seq: Sequence) -> int:
    """Tokens before the newest one that have yet to go through the model."""
    return max(0, seq.length - 1 - seq.computed)

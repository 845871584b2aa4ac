"""`Forecast`: how long until waiting requests start, from how far the running ones are and how long steps take.

Owns the times of the latest steps, told after each by the engine's thread. Changes nothing. Asked by the threads of
callers that were refused, and so rarely: what it has to read of every sequence is read once per step at most.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from statistics import fmean, median

from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence, Status
from penstock.step import StepRecord

_WINDOW = 64  # steps


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What a look at all sequences says, in steps.

    `ends`: when the running ones will have ended, ascending. `lengths`: what those that wait take, in order of arrival.
    `width`: sequences of a waiting request. `num_free`: places for others that are free.
    """

    ends: list[float]
    lengths: list[float]
    width: float
    num_free: int


@dataclass(frozen=True, slots=True)
class _Used:
    """Which fraction of their `max_tokens` sequences use: `fractions` ascending, `means[i]` of those from i on."""

    fractions: list[float]
    means: list[float]

    @classmethod
    def of(cls, fractions: list[float]) -> _Used:
        """What those that ended used."""
        fractions = sorted(fractions)
        totals = list(accumulate(reversed(fractions)))
        means = [total / count for count, total in enumerate(totals, 1)][::-1]
        return cls(fractions, [*means, 1.0])

    def left(self, seq: Sequence) -> float:
        """Tokens that a sequence has yet to generate, as those that ended did who came as far as it has."""
        allowed, count = seq.max_len - seq.prompt_len, seq.num_generated
        return max(1.0, self.means[bisect_right(self.fractions, count / allowed)] * allowed - count)


class Forecast:
    """`static`: whoever runs ends before anybody else starts. `clock` gives seconds."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float], static: bool = False) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._static = static
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._drafting: deque[tuple[int, int]] = deque(maxlen=_WINDOW)  # tokens generated, by so many streams
        self._last: StepRecord | None = None
        self._last_s = 0.0
        self._known: tuple[StepRecord, _Outlook] | None = None

    def record(self, record: StepRecord) -> None:
        """A step has just ended."""
        self._seconds.append(record.seconds)
        if record.tokens - record.prompt_tokens > record.streams:
            self._drafting.append((record.generated, record.streams))
        self._last_s = self._clock()
        self._last = record  # from here on another thread may ask

    def wait_s(self, num_requests: int, num_tokens: float) -> float | None:
        """Seconds until so many waiting requests, of so many prompt tokens, have started; None before the first step.

        Those who run are taken to use as much of their `max_tokens` as those did who ended.
        """
        last = self._last
        if last is None:
            return None
        step_s = self._step_s()
        outlook = self._outlook(last)
        steps = self._steps(outlook, num_requests, num_tokens)
        if not outlook.ends:
            return steps * step_s
        elapsed_s = self._clock() - self._last_s
        return (steps - 1) * step_s + (step_s - elapsed_s if elapsed_s < step_s else elapsed_s)  # a stall counts

    def _step_s(self) -> float:
        """What a step takes: the mean of late; as long as few are known, the median, since the first are prefills."""
        seconds = list(self._seconds)
        return fmean(seconds) if len(seconds) == _WINDOW else median(seconds)

    def _steps(self, outlook: _Outlook, num_requests: int, num_tokens: float) -> float:
        """Steps until the last of so many has started: when a place is free for it, and the prompts before it ran."""
        prompts = num_tokens / max(1, self._scheduler.limits.step_tokens - len(outlook.ends))
        if self._static and outlook.ends:
            return outlook.ends[-1]
        num_before = int((num_requests - 1) * outlook.width)
        places = [1.0] * min(outlook.num_free, 1 + num_before) + outlook.ends  # ascending, and so a heap
        if not places:
            return max(1.0, prompts)
        for length in islice(cycle(outlook.lengths or [1.0]), num_before):
            heapq.heapreplace(places, places[0] + length)
        return max(places[0], prompts)

    def _outlook(self, last: StepRecord) -> _Outlook:
        known = self._known
        if known is None or known[0] is not last:
            known = self._known = last, self._look(last)
        return known[1]

    def _look(self, last: StepRecord) -> _Outlook:
        scheduler = self._scheduler
        everyone = scheduler.sequences()
        running = [seq for seq in everyone if seq.status is Status.RUNNING]
        waiting = [seq for seq in everyone if seq.status is Status.WAITING]
        pace, used = self._pace(), _Used.of(scheduler.used_lengths)
        prefill = sum(map(_backlog, running)) / scheduler.limits.step_tokens
        ends = sorted(used.left(seq) / pace + (prefill if _backlog(seq) else 0.0) for seq in running)
        width = len(waiting) / max(1, len({seq.request_id for seq in waiting}))
        num_free = 0 if self._lacks_blocks(last) else max(0, scheduler.limits.max_running - len(running))
        return _Outlook(ends, [used.left(seq) / pace for seq in waiting], max(1.0, width), num_free)

    def _lacks_blocks(self, last: StepRecord) -> bool:
        """Whether somebody was left waiting although the step had room for more rows and more tokens."""
        limits = self._scheduler.limits
        return last.waiting > 0 and last.rows < limits.max_running and last.tokens < limits.step_tokens

    def _pace(self) -> float:
        """Tokens of a stream in a step; more than one where drafts are right."""
        counts = list(self._drafting)
        generated, streams = sum(count for count, _ in counts), sum(count for _, count in counts)
        return max(1.0, generated / streams) if streams else 1.0


def _backlog(seq: Sequence) -> int:
    """Tokens before the newest one that have yet to go through the model."""
    return max(0, seq.length - 1 - seq.computed)

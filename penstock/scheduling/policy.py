"""`Policy`: which sequence goes first, as pure key functions. Smaller keys are better.

Owns the meaning of priority, waiting time and deadlines, and what is known of anything that waits (`Queued`). Keeps no
state and reads no clock. Called by `WaitingQueue`, `LiveSequences` and `StepPlanner`.
"""

from __future__ import annotations

import math
from typing import Protocol

Key = tuple[int, float, float, int]


class Queued(Protocol):
    """Something that waits for its turn: a `Sequence` of the engine, a `Ticket` of a `DynamicBatcher`."""

    @property
    def id(self) -> int:
        """Unique."""
        ...

    @property
    def request_id(self) -> str:
        """The request it belongs to; several may share one."""
        ...

    @property
    def priority(self) -> int:
        """Its class; higher goes first."""
        ...

    @property
    def arrival(self) -> float:
        """When it arrived, in seconds."""
        ...

    @property
    def deadline(self) -> float:
        """When it must be done, in seconds; infinity for no deadline."""
        ...

    @property
    def length(self) -> int:
        """Its tokens now."""
        ...

    @property
    def max_len(self) -> int:
        """The maximum of its tokens when it ends."""
        ...

    @property
    def width(self) -> int:
        """How many with its `request_id` must run in the same steps."""
        ...


class Policy(Protocol):
    """The order of those that wait and of those that run."""

    def waiting_key(self, seq: Queued, now: float) -> Key:
        """Key among the waiting at time `now`."""
        ...

    def next_change(self, seq: Queued, now: float) -> float:
        """When, after `now`, the waiting key changes by itself; infinity for never."""
        ...

    def rank(self, seq: Queued) -> int:
        """Class alone. Only a strictly higher one may displace a running sequence."""
        ...

    def running_key(self, seq: Queued, num_preemptions: int) -> Key:
        """Key among the running; constant until preempted. Its first element is minus the class it defends."""
        ...


class AgingPolicy:
    """Class first, one class up for every `boost_s` seconds of waiting, then the earliest deadline, then FIFO.

    Boosts have no limit, so a sequence that waited long enough goes before every newcomer of any class: nothing
    starves. Among the running, waiting time no longer counts; each preemption moves the victim one class up there, so
    that a stream of newcomers cannot preempt it again and again.
    """

    def __init__(self, boost_s: float) -> None:
        self.boost_s = boost_s

    def waiting_key(self, seq: Queued, now: float) -> Key:
        """Key among the waiting at time `now`."""
        return (-(seq.priority + self._num_boosts(seq, now)), seq.deadline, seq.arrival, seq.id)

    def next_change(self, seq: Queued, now: float) -> float:
        """When the next boost is due."""
        num_boosts = self._num_boosts(seq, now)
        time_s = seq.arrival + (num_boosts + 1) * self.boost_s
        while self._num_boosts(seq, time_s) <= num_boosts:
            time_s = math.nextafter(time_s, math.inf)  # the sum was rounded to just before the change
        return time_s

    def rank(self, seq: Queued) -> int:
        """The priority class."""
        return int(seq.priority)

    def running_key(self, seq: Queued, num_preemptions: int) -> Key:
        """Key among the running."""
        return (-(seq.priority + num_preemptions), seq.deadline, seq.arrival, seq.id)

    def _num_boosts(self, seq: Queued, now: float) -> int:
        return max(0, math.floor((now - seq.arrival) / self.boost_s))

"""`Policy`: who goes first, as pure key functions. Smaller keys are better.

Owns the meaning of priority, waiting time and deadlines, and what anything that waits must know of itself (`Waiter`).
Keeps no state and asks no clock. Called by `WaitingQueue` and by `Scheduler`.
"""

from __future__ import annotations

import math
from typing import Protocol

Key = tuple[int, float, float, int]


class Waiter(Protocol):
    """Something that waits for its turn: a `Sequence` of the engine, an item of a `DynamicBatcher`."""

    @property
    def id(self) -> int:
        """Unlike any other's."""
        ...

    @property
    def request_id(self) -> str:
        """Whose it is: what has the same one belongs together."""
        ...

    @property
    def priority(self) -> int:
        """Its class; higher goes first."""
        ...

    @property
    def arrival(self) -> float:
        """When it came, in seconds."""
        ...

    @property
    def deadline(self) -> float:
        """When it must be done, in seconds; infinity for whenever."""
        ...

    @property
    def length(self) -> int:
        """Its tokens now."""
        ...

    @property
    def max_len(self) -> int:
        """Its tokens at its end, at most."""
        ...

    @property
    def width(self) -> int:
        """How many with its `request_id` need each other in every step."""
        ...


class Policy(Protocol):
    """What the queue and the scheduler ask."""

    def key(self, seq: Waiter, now: float) -> Key:
        """Place among the waiting at time `now`."""
        ...

    def next_change(self, seq: Waiter, now: float) -> float:
        """When, after `now`, the key changes by itself; infinity for never."""
        ...

    def rank(self, seq: Waiter) -> int:
        """Class alone. Only a strictly higher one may take a running sequence's place."""
        ...

    def standing(self, seq: Waiter, num_preemptions: int) -> Key:
        """Place among the running; constant until preempted. Its first element is minus the class it defends."""
        ...


class AgingPolicy:
    """Class first, one class up for every `boost_s` seconds of waiting, then the earliest deadline, then FIFO.

    Tiers have no top, so whoever waited long enough beats every newcomer of any class: nothing starves. Among the
    running, waiting counts no more; each preemption moves the victim one class up there, so that a stream of
    newcomers cannot preempt it for ever.
    """

    def __init__(self, boost_s: float) -> None:
        self.boost_s = boost_s

    def key(self, seq: Waiter, now: float) -> Key:
        """Place among the waiting at time `now`."""
        return (-(seq.priority + self._boosts(seq, now)), seq.deadline, seq.arrival, seq.id)

    def next_change(self, seq: Waiter, now: float) -> float:
        """When it next moves one tier up."""
        boosts = self._boosts(seq, now)
        when = seq.arrival + (boosts + 1) * self.boost_s
        while self._boosts(seq, when) <= boosts:
            when = math.nextafter(when, math.inf)  # the sum was rounded to just before the change
        return when

    def rank(self, seq: Waiter) -> int:
        """The priority class."""
        return int(seq.priority)

    def standing(self, seq: Waiter, num_preemptions: int) -> Key:
        """Place among the running."""
        return (-(seq.priority + num_preemptions), seq.deadline, seq.arrival, seq.id)

    def _boosts(self, seq: Waiter, now: float) -> int:
        return max(0, math.floor((now - seq.arrival) / self.boost_s))

"""`Admission`: the door to the waiting queue, counted before any work is done for a request.

Owns how many requests and prompt tokens wait, and who of them gives way to a higher class. Never holds a request.
Called by callers' threads (`reserve`) and by the engine's (`adjust`, `release`): the one place below the engine with a
lock, held for a few additions and never while anything else runs.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.config import EngineConfig
from penstock.errors import EngineOverloaded
from penstock.sampling import RequestPriority

_RETRY_S = (0.001, 60.0)  # shortest and longest honest advice
_UNKNOWN_S = 1.0  # advice where nothing is known yet
_SLACK = 64  # stale entries that are not worth a rebuild

# (requests, their prompt tokens) -> seconds until so many of those that wait have started; None while unknown.
Foresight = Callable[[int, float], float | None]


@dataclass(slots=True, eq=False)
class Place:
    """What one request holds of the waiting room, from `reserve` to its start or end. Written by `Admission` only.

    `is_lost` says that a request of a higher class has it now.
    """

    request_id: str
    num_tokens: int
    priority: int = RequestPriority.NORMAL
    deadline: float = math.inf
    is_held: bool = False
    is_lost: bool = False


@dataclass(slots=True)
class _Class:
    """The places of one priority class; `heap` has its worst first: the latest deadline, then the newest."""

    num_requests: int = 0
    num_tokens: int = 0
    heap: list[tuple[float, int, Place]] = field(default_factory=list)


class Admission:
    """Limits are read from `config` at every call, so an assignment takes effect at once.

    `foresee` is asked how long refused requests should wait; it knows nothing until somebody sets it.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.foresee: Foresight = lambda num_requests, num_tokens: None
        self._config = config
        # Reentrant: what is allocated under it may set off the garbage collector, and that anybody's finalizers.
        self._lock = threading.RLock()
        self._requests = 0
        self._tokens = 0
        self._classes: dict[int, _Class] = {}
        self._numbers = itertools.count()

    @property
    def num_requests(self) -> int:
        """Requests that wait."""
        return self._requests

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._tokens

    def reserve(self, places: Sequence[Place]) -> list[Place]:
        """Count requests of one class in before they are tokenized, all or none; token counts may be estimates.

        Returns the places that had to be given up for them: the worst ones of lower classes, whose requests are to be
        ended. Raises `EngineOverloaded` when more would wait than max_queue_size or max_queued_tokens allow without
        those. A request that finds nobody waiting passes whatever its length, since for it no later time would be
        better.
        """
        with self._lock:
            kept_requests, kept_tokens = self._kept(places[0].priority)
            shortage = self._shortage(places, kept_requests, kept_tokens)
            if shortage is None:
                lost = self._evict(places)
                for place in places:
                    self._add(place)
                return lost
        raise self._refusal(*shortage)

    def adjust(self, place: Place, num_tokens: int) -> None:
        """The exact prompt length became known. Never refuses."""
        with self._lock:
            if place.is_held:
                self._count(place, 0, num_tokens - place.num_tokens)
            place.num_tokens = num_tokens

    def release(self, *places: Place) -> None:
        """Count requests out: first planned, or dropped before that. Harmless twice."""
        with self._lock:
            for place in places:
                if place.is_held:
                    self._drop(place)

    def displaced(self) -> EngineOverloaded:
        """What a request that lost its place is told."""
        return self._refusal("a request of a higher class took the place of this one", 1, 0)

    def _kept(self, priority: int) -> tuple[int, int]:
        """Requests and tokens that do not give way to this class."""
        kept = [found for rank, found in self._classes.items() if rank >= priority]
        return sum(found.num_requests for found in kept), sum(found.num_tokens for found in kept)

    def _shortage(self, places: Sequence[Place], requests: int, tokens: int) -> tuple[str, int, int] | None:
        """Why these cannot come in beside so many that stay, and how many requests and tokens are too many."""
        most, most_tokens = self._config.max_queue_size, self._config.max_queued_tokens
        excess = requests + len(places) - most
        if excess > 0:
            return f"{self._requests} of {most} requests wait (max_queue_size)", excess, 0
        if most_tokens is None or not requests:
            return None
        excess = tokens + sum(place.num_tokens for place in places) - most_tokens
        return (f"{self._tokens} of {most_tokens} tokens wait (max_queued_tokens)", 0, excess) if excess > 0 else None

    def _evict(self, places: Sequence[Place]) -> list[Place]:
        """Take places of lower classes, worst first, until these find room; it was checked that they will."""
        lost: list[Place] = []
        while self._shortage(places, self._requests, self._tokens) is not None:
            worst = self._worst()
            assert worst.priority < places[0].priority, "only lower classes give way"
            self._drop(worst)
            worst.is_lost = True
            lost.append(worst)
        return lost

    def _worst(self) -> Place:
        """The worst place of the lowest class."""
        lowest = self._classes[min(rank for rank, found in self._classes.items() if found.num_requests)]
        while not lowest.heap[0][2].is_held:
            heapq.heappop(lowest.heap)
        return lowest.heap[0][2]

    def _add(self, place: Place) -> None:
        place.is_held = True
        self._count(place, 1, place.num_tokens)
        found = self._classes[place.priority]
        heapq.heappush(found.heap, (-place.deadline, -next(self._numbers), place))
        if len(found.heap) > 2 * found.num_requests + _SLACK:
            found.heap = [entry for entry in found.heap if entry[2].is_held]
            heapq.heapify(found.heap)

    def _drop(self, place: Place) -> None:
        place.is_held = False
        self._count(place, -1, -place.num_tokens)

    def _count(self, place: Place, num_requests: int, num_tokens: int) -> None:
        found = self._classes.setdefault(place.priority, _Class())
        found.num_requests += num_requests
        found.num_tokens += num_tokens
        self._requests += num_requests
        self._tokens += num_tokens

    def _refusal(self, what: str, num_requests: int, num_tokens: int) -> EngineOverloaded:
        wait_s = self._wait_s(num_requests, num_tokens)
        if wait_s is None:
            advice = "How long that takes is not known yet: retry in a second"
        else:
            advice = f"Retry in about {wait_s:.2g} s"
        return EngineOverloaded(f"Request queue is full: {what}. {advice}, or raise the limit.", wait_s or _UNKNOWN_S)

    def _wait_s(self, num_requests: int, num_tokens: int) -> float | None:
        """Time until so many have left; requests that wait are taken to have prompts of one length."""
        mean = self._tokens / self._requests if self._requests else 1.0
        leaving = max(num_requests, min(self._requests, math.ceil(num_tokens / max(mean, 1.0))))
        wait_s = self.foresee(leaving, leaving * mean)
        return None if wait_s is None else min(max(wait_s, _RETRY_S[0]), _RETRY_S[1])

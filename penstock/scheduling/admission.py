"""`Admission`: admits requests to the waiting queue, before any work is done for them.

Owns how many requests and prompt tokens wait, and which of them give way to a higher class. Never holds a request.
Called by callers' threads (`reserve`) and by the engine's (`adjust`, `release`): the one module below the engine with a
lock, which is held for a few additions only.
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

_RETRY_S = (0.001, 60.0)  # shortest and longest retry_after
_UNKNOWN_RETRY_S = 1.0  # retry_after without an estimate
_SLACK = 64  # stale heap entries that are not worth a rebuild

# (requests, their prompt tokens) -> seconds until so many waiting ones have started; None while unknown.
WaitEstimate = Callable[[int, float], float | None]


@dataclass(slots=True, eq=False)
class QueuePlace:
    """What one request occupies of the waiting queue, from `reserve` to its start or end. Written by `Admission` only.

    `is_lost` says that a request of a higher class took it.
    """

    request_id: str
    num_tokens: int
    priority: int = RequestPriority.NORMAL
    deadline: float = math.inf
    is_held: bool = False
    is_lost: bool = False


@dataclass(slots=True)
class _Class:
    """The places of one priority class; `heap` has the worst first: the latest deadline, then the newest."""

    num_requests: int = 0
    num_tokens: int = 0
    heap: list[tuple[float, int, QueuePlace]] = field(default_factory=list)


class Admission:
    """Limits are read from `config` at every call, so an assignment takes effect at once.

    `estimate_wait` gives the seconds that refused requests should wait; unknown until the engine sets it. `on_release`
    is set while coroutines wait for room. It is called once for every place that was freed or turned out to need fewer
    tokens, on any thread and without the lock.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.estimate_wait: WaitEstimate = lambda num_requests, num_tokens: None
        self.on_release: Callable[[], None] | None = None
        self._config = config
        # Reentrant: an allocation under the lock may trigger the garbage collector, and with it any finalizer.
        self._lock = threading.RLock()
        self._num_requests = 0
        self._num_tokens = 0
        self._num_refused = 0
        self._classes: dict[int, _Class] = {}
        self._numbers = itertools.count()

    @property
    def num_requests(self) -> int:
        """Requests that wait."""
        return self._num_requests

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._num_tokens

    @property
    def num_refused(self) -> int:
        """Requests that found the queue full, so far."""
        return self._num_refused

    def reserve(self, places: Sequence[QueuePlace]) -> list[QueuePlace]:
        """Count requests of one class in before they are tokenized, all or none; token counts may be estimates.

        Returns the places that were taken away for them: the worst ones of lower classes, whose requests the caller has
        to end. Raises `EngineOverloaded` if, even so, more would wait than max_queue_size or max_queued_tokens allow. A
        request passes whatever its length if no other of its class or a higher one waits, since waiting would not help
        it.
        """
        with self._lock:
            num_requests, num_tokens = self._immovable(places[0].priority)
            shortage = self._shortage(places, num_requests, num_tokens)
            if shortage is None:
                victims = self._evict(places)
                for place in places:
                    self._add(place)
                return victims
            self._num_refused += len(places)
        raise self._refusal(*shortage)

    def has_room(self, num_tokens: int, priority: int) -> bool:
        """Whether `reserve` would admit a request of this class now, if need be in place of a lower one."""
        with self._lock:
            return self._shortage([QueuePlace("", num_tokens, priority)], *self._immovable(priority)) is None

    def adjust(self, place: QueuePlace, num_tokens: int) -> None:
        """Set the exact prompt length, once it is known. Never refuses."""
        with self._lock:
            is_shorter = place.is_held and num_tokens < place.num_tokens
            if place.is_held:
                self._count(place, 0, num_tokens - place.num_tokens)
            place.num_tokens = num_tokens
        if is_shorter and (on_release := self.on_release) is not None:
            on_release()

    def release(self, *places: QueuePlace) -> None:
        """Count requests out: first planned, or dropped before that. Idempotent."""
        num_freed = 0
        with self._lock:
            for place in places:
                if place.is_held:
                    self._drop(place)
                    num_freed += 1
        if (on_release := self.on_release) is not None:
            for _ in range(num_freed):
                on_release()

    def displaced(self) -> EngineOverloaded:
        """The error of a request that lost its place."""
        return self._refusal("a request of a higher class took the place of this one", 1, 0)

    def _immovable(self, priority: int) -> tuple[int, int]:
        """Waiting requests and tokens that do not give way to this class."""
        classes = [places for rank, places in self._classes.items() if rank >= priority]
        return sum(places.num_requests for places in classes), sum(places.num_tokens for places in classes)

    def _shortage(
        self, places: Sequence[QueuePlace], num_requests: int, num_tokens: int
    ) -> tuple[str, int, int] | None:
        """Why these cannot be admitted beside so many, and how many requests and tokens are too many."""
        max_requests, max_tokens = self._config.max_queue_size, self._config.max_queued_tokens
        excess = num_requests + len(places) - max_requests
        if excess > 0:
            return f"{self._num_requests} of {max_requests} requests wait", excess, 0
        if max_tokens is None or not num_requests:
            return None
        excess = num_tokens + sum(place.num_tokens for place in places) - max_tokens
        if excess <= 0:
            return None
        return f"{self._num_tokens} of {max_tokens} prompt tokens wait", 0, excess

    def _evict(self, places: Sequence[QueuePlace]) -> list[QueuePlace]:
        """Take places of lower classes, worst first, until these fit; the caller has checked that they will."""
        victims: list[QueuePlace] = []
        while self._shortage(places, self._num_requests, self._num_tokens) is not None:
            victim = self._worst()
            assert victim.priority < places[0].priority, "only lower classes give way"
            self._drop(victim)
            victim.is_lost = True
            victims.append(victim)
        return victims

    def _worst(self) -> QueuePlace:
        """The worst place of the lowest class."""
        lowest = self._classes[min(rank for rank, places in self._classes.items() if places.num_requests)]
        while not lowest.heap[0][2].is_held:
            heapq.heappop(lowest.heap)
        return lowest.heap[0][2]

    def _add(self, place: QueuePlace) -> None:
        place.is_held = True
        self._count(place, 1, place.num_tokens)
        places = self._classes[place.priority]
        heapq.heappush(places.heap, (-place.deadline, -next(self._numbers), place))
        if len(places.heap) > 2 * places.num_requests + _SLACK:
            places.heap = [entry for entry in places.heap if entry[2].is_held]
            heapq.heapify(places.heap)

    def _drop(self, place: QueuePlace) -> None:
        place.is_held = False
        self._count(place, -1, -place.num_tokens)

    def _count(self, place: QueuePlace, num_requests: int, num_tokens: int) -> None:
        places = self._classes.setdefault(place.priority, _Class())
        places.num_requests += num_requests
        places.num_tokens += num_tokens
        self._num_requests += num_requests
        self._num_tokens += num_tokens

    def _refusal(self, cause: str, num_requests: int, num_tokens: int) -> EngineOverloaded:
        wait_s = self._wait_s(num_requests, num_tokens)
        if wait_s is None:
            advice = "How long the queue takes is not known yet: retry in a second"
        else:
            advice = f"Retry in about {wait_s:.2g} s"
        setting = "max_queued_tokens" if num_tokens else "max_queue_size"
        error = EngineOverloaded(f"Request queue is full: {cause}. {advice}.", wait_s or _UNKNOWN_RETRY_S)
        return error.with_hint(f"To let more requests wait, raise {setting}; `wait_for_room` waits until one may.")

    def _wait_s(self, num_requests: int, num_tokens: int) -> float | None:
        """Seconds until so many have left the queue, if all waiting requests have prompts of the same length."""
        mean = self._num_tokens / self._num_requests if self._num_requests else 1.0
        num_leaving = max(num_requests, min(self._num_requests, math.ceil(num_tokens / max(mean, 1.0))))
        wait_s = self.estimate_wait(num_leaving, num_leaving * mean)
        return None if wait_s is None else min(max(wait_s, _RETRY_S[0]), _RETRY_S[1])

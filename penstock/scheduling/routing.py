"""`Router`: which of several replicas of one model a waiting request goes to, and when.

Owns the queue of requests that no replica has yet, what every replica was given, and which prefixes it has computed. A
state machine without clock, thread or model. Called by `Dispatcher` on its event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from penstock.cache.prefix import PrefixIndex, digest
from penstock.scheduling.policy import AgingPolicy
from penstock.scheduling.queue import WaitingQueue

LEAST_SHARE = 0.5  # of a prompt that a replica must have computed before that counts
MAX_RATIO, MAX_LEAD = 1.5, 8  # how far above the least load a replica may be and still be chosen for its prefix
MAX_FAILURES = 3  # requests in a row that failed in the forward pass, after which a replica is chosen last


class RoutingStats(TypedDict):
    """What one replica was given: `load` samples now; requests, their prompt tokens, and how many were expected in
    its cache, so far. `num_prefix_blocks` are the blocks that it is expected to find."""

    load: int
    num_requests: int
    prompt_tokens: int
    expected_hit_tokens: int
    num_prefix_blocks: int


@dataclass(slots=True, eq=False)
class Pending:
    """A request that waits, or was given to `replica`. `width` is its number of samples, `digests` those of the full
    blocks of its `length` prompt tokens. `replica`, `hit_tokens` and `num_resets`, how often the caches had been reset
    when it was given to the replica, are written by `Router` only."""

    id: int
    request_id: str
    priority: int
    arrival: float
    deadline: float
    length: int
    width: int
    digests: list[bytes]
    replica: int | None = None
    hit_tokens: int = 0
    num_resets: int = 0

    @property
    def max_len(self) -> int:
        """Its tokens; how many it will generate does not matter here."""
        return self.length


class Candidate(NamedTuple):
    """A replica with room for a request: its load in samples, how many tokens of the prompt it has computed, and how
    many blocks of prefixes in all."""

    number: int
    load: int
    hit_tokens: int
    num_blocks: int


# Chooses among at least one candidate for a prompt of so many tokens; the result depends on nothing else.
Choice = Callable[[Sequence[Candidate], int], Candidate]


def by_prefix(candidates: Sequence[Candidate], num_tokens: int) -> Candidate:
    """The replica that has computed the longest prefix, unless that is short or the replica is much busier.

    It must have computed at least half of the prompt, and its load must not exceed the least one by more than 8 and by
    more than half; otherwise the least loaded replica is chosen. Ties go to the longer prefix or the lower load, then
    to the replica with fewer prefixes, then to the first. The rule of exploiting a prefix only where it is at least
    half of the prompt is Preble's (Srivatsa et al., 2024), the bound on the load is that of SGLang's router.
    """
    min_load = min(candidate.load for candidate in candidates)
    bound, min_hit = max(min_load + MAX_LEAD, MAX_RATIO * min_load), LEAST_SHARE * num_tokens
    near = [candidate for candidate in candidates if candidate.load <= bound and candidate.hit_tokens >= min_hit]
    if near:
        return min(near, key=lambda candidate: (-candidate.hit_tokens, candidate.load, candidate.number))
    return by_load(candidates, num_tokens)


def by_load(candidates: Sequence[Candidate], num_tokens: int) -> Candidate:
    """The least loaded replica, then the one with the longest prefix, then with the fewest prefixes, then the first."""
    return min(candidates, key=lambda place: (place.load, -place.hit_tokens, place.num_blocks, place.number))


class RoundRobin:
    """The next replica in turn that has room, whatever it has computed."""

    def __init__(self) -> None:
        self._last = -1

    def __call__(self, candidates: Sequence[Candidate], num_tokens: int) -> Candidate:
        """The first candidate after the one chosen last, by number."""
        chosen = min(candidates, key=lambda candidate: (candidate.number <= self._last, candidate.number))
        self._last = chosen.number
        return chosen


class KnownPrefixes:
    """The digests of the blocks that a replica is expected to have in its cache, at most `max_blocks` of them.

    Forgets the least recently used first, and the end of a prefix before its beginning, as the cache itself does.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._digests)

    def match(self, digests: Sequence[bytes]) -> int:
        """How many blocks from the beginning are known."""
        return next((i for i, key in enumerate(digests) if key not in self._digests), len(digests))

    def add(self, digests: Sequence[bytes]) -> None:
        """These blocks are computed, or used again."""
        for key in reversed(digests):
            self._digests[key] = None
            self._digests.move_to_end(key)
        while len(self._digests) > self._max_blocks:
            self._digests.popitem(last=False)

    def clear(self) -> None:
        """Nothing is found any more."""
        self._digests.clear()


class _Replica:
    """What one replica was given. `num_failures` counts requests in a row that failed in the forward pass."""

    def __init__(self, prefixes: KnownPrefixes) -> None:
        self.prefixes = prefixes
        self.is_live = True
        self.load = self.num_failures = 0
        self.num_requests = self.prompt_tokens = self.expected_hit_tokens = 0


class Router:
    """Gives requests to replicas, best first: class and waiting time, then deadline, then arrival.

    A replica has room for requests of up to `capacity` samples; one that is wider goes to an idle replica. `max_blocks`
    is the size of each replica's cache, in blocks of `block_size` tokens; 0 for one that keeps no prefixes.
    """

    def __init__(
        self, max_blocks: Sequence[int], *, capacity: int, block_size: int, boost_s: float, choose: Choice = by_prefix
    ) -> None:
        self._replicas = [_Replica(KnownPrefixes(blocks)) for blocks in max_blocks]
        self._capacity = capacity
        self._block_size = block_size
        self._queue = WaitingQueue[Pending](AgingPolicy(boost_s))
        self._choose = choose
        self._index = PrefixIndex()
        self._num_resets = 0

    @property
    def num_waiting(self) -> int:
        """Requests that no replica has yet."""
        return len(self._queue)

    @property
    def live(self) -> list[int]:
        """The numbers of the replicas that have not failed."""
        return [number for number, replica in enumerate(self._replicas) if replica.is_live]

    def digests(self, namespace: str, adapter: str, tokens: Sequence[int], first: Sequence[bytes] = ()) -> list[bytes]:
        """The digests of the full blocks of tokens in a namespace under an adapter; `first` are those known already."""
        size, digests = self._block_size, [*first]
        for begin in range(len(digests) * size, len(tokens) - size + 1, size):
            parent = digests[-1] if digests else self._index.root(namespace, adapter)
            digests.append(digest(parent, tokens[begin : begin + size]))
        return digests

    def add(self, request: Pending, now: float) -> None:
        """Let a request wait; also one that a replica did not take."""
        if request.replica is not None:
            replica = self._take_back(request)
            replica.num_requests -= 1
            replica.prompt_tokens -= request.length
            replica.expected_hit_tokens -= request.hit_tokens
        self._queue.push(request, now)

    def remove(self, request: Pending) -> None:
        """A waiting request has ended."""
        self._queue.remove(request.id)

    def assign(self, now: float) -> list[Pending]:
        """Give waiting requests to replicas while the best of them finds room; returns these in order."""
        assigned: list[Pending] = []
        self._queue.advance(now)
        while (request := self._queue.peek()) is not None and (candidates := self._candidates(request)):
            chosen = self._choose(candidates, request.length)
            self._queue.remove(request.id)
            self._give(request, chosen)
            assigned.append(request)
        return assigned

    def end(self, request: Pending, *, digests: Sequence[bytes] = (), has_failed: bool | None = None) -> None:
        """A request that a replica was given has ended; `digests` are those of its prompt and output.

        `has_failed` says whether the forward pass failed; None for a request that was aborted or refused.
        """
        replica = self._take_back(request)
        if has_failed is not None:
            replica.num_failures = replica.num_failures + 1 if has_failed else 0
        if request.num_resets == self._num_resets:
            replica.prefixes.add(digests)

    def lose(self, number: int) -> None:
        """A replica has failed: give it nothing more. What it was given ends by itself."""
        self._replicas[number].is_live = False
        self._replicas[number].prefixes.clear()

    def forget_prefixes(self, *, of_running: bool = False) -> None:
        """No replica finds what it has computed so far, for instance because the weights changed.

        With `of_running` also not what those requests compute that it has now: the cache was reset under them.
        """
        self._num_resets += of_running
        for replica in self._replicas:
            replica.prefixes.clear()

    def stats(self) -> list[RoutingStats]:
        """What every replica was given."""
        return [
            {
                "load": replica.load,
                "num_requests": replica.num_requests,
                "prompt_tokens": replica.prompt_tokens,
                "expected_hit_tokens": replica.expected_hit_tokens,
                "num_prefix_blocks": len(replica.prefixes),
            }
            for replica in self._replicas
        ]

    def _candidates(self, request: Pending) -> list[Candidate]:
        """The live replicas with room; those whose forward pass keeps failing only if there are no others."""
        numbers = [
            number
            for number in self.live
            if not (load := self._replicas[number].load) or load + request.width <= self._capacity
        ]
        sound = [number for number in numbers if self._replicas[number].num_failures < MAX_FAILURES]
        return [self._candidate(number, request) for number in sound or numbers]

    def _candidate(self, number: int, request: Pending) -> Candidate:
        replica = self._replicas[number]
        hit_tokens = replica.prefixes.match(request.digests) * self._block_size
        return Candidate(number, replica.load, hit_tokens, len(replica.prefixes))

    def _give(self, request: Pending, chosen: Candidate) -> None:
        replica = self._replicas[chosen.number]
        request.replica, request.hit_tokens, request.num_resets = chosen.number, chosen.hit_tokens, self._num_resets
        replica.load += request.width
        replica.num_requests += 1
        replica.prompt_tokens += request.length
        replica.expected_hit_tokens += chosen.hit_tokens
        replica.prefixes.add(request.digests)

    def _take_back(self, request: Pending) -> _Replica:
        assert request.replica is not None
        replica = self._replicas[request.replica]
        replica.load -= request.width
        request.replica = None
        return replica

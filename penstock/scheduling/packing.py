"""`Packing`: which of the waiting start together. One object per strategy, chosen when a scheduler is made.

Owns the meaning of the four batching strategies, for the engine and for `DynamicBatcher` alike. Never starts, moves or
changes anybody. Called by `Scheduler` and `DynamicBatcher`, which ask `permits` before any start and follow `starts`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Protocol, TypeVar

from penstock.config import BatchingStrategy, EngineConfig
from penstock.errors import RequestTooLarge
from penstock.scheduling.limits import Limits
from penstock.scheduling.policy import Waiter
from penstock.scheduling.queue import WaitingQueue

MIB = 1 << 20
W = TypeVar("W", bound=Waiter)
Fits = Callable[[W], bool]
# MiB that a batch of sequences of such lengths comes to.
Cost = Callable[[SequenceOf[int]], float]


class Group(Protocol):
    """Some that run."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Waiter]: ...


class Packing(Protocol):
    """A strategy. `running` are those that run, `leaving` those of them that would give up their places."""

    def check(self, seq: Waiter) -> None:
        """Raise `RequestTooLarge` for what `permits` would refuse even alone, so that nothing waits in vain."""
        ...

    def permits(self, seq: Waiter, running: Group, leaving: Group = ()) -> bool:
        """Whether a waiting one may join those that run, whatever room there is for it."""
        ...

    def starts(self, waiting: WaitingQueue[W], running: Group, fits: Fits[W]) -> Iterator[W]:
        """Who starts in this step, one by one: `fits` held for each when it was yielded, and it starts before the next.

        `fits` says whether there is room now, and includes `permits`.
        """
        ...


class Continuous:
    """Whoever is next starts as soon as there is room; the head of the queue is never passed."""

    def check(self, seq: Waiter) -> None:
        """Everything may run."""

    def permits(self, seq: Waiter, running: Group, leaving: Group = ()) -> bool:
        """Anybody, any time."""
        return True

    def starts(self, waiting: WaitingQueue[W], running: Group, fits: Fits[W]) -> Iterator[W]:
        """In the queue's order, until one has no room."""
        while (seq := waiting.peek()) is not None and fits(seq):
            yield seq


class Naive(Continuous):
    """Static batches: the best of those who wait when nobody runs; nobody joins until all of them are done.

    A batch starts in its order, over as many steps as the budget takes, and a victim of it comes back to it, as do
    samples and beams of its requests. This is the one strategy that makes a higher class wait for a lower one, because
    a static batch cannot be joined.
    """

    def __init__(self, max_batch_size: Callable[[], int]) -> None:
        self._max_batch_size = max_batch_size
        self._batch: dict[str, int] = {}  # places of its requests
        self._begun: set[str] = set()

    def permits(self, seq: Waiter, running: Group, leaving: Group = ()) -> bool:
        """Members of the batch that runs."""
        return seq.request_id in self._batch

    def starts(self, waiting: WaitingQueue[W], running: Group, fits: Fits[W]) -> Iterator[W]:
        """The members that wait, best first; a new batch once nobody runs and nobody who began waits."""
        self._begun.update(seq.request_id for seq in running)  # one of a higher class may have started before this
        members = self._members(waiting)
        if not running and not any(seq.request_id in self._begun for seq in members):
            best = dict.fromkeys(seq.request_id for seq in waiting.best(self._max_batch_size()))
            self._batch = {request_id: place for place, request_id in enumerate(best)}
            self._begun.clear()
            members = self._members(waiting)
        for seq in members:
            if not fits(seq):
                return
            self._begun.add(seq.request_id)
            yield seq

    def _members(self, waiting: WaitingQueue[W]) -> list[W]:
        members = [seq for seq in waiting if seq.request_id in self._batch]
        return sorted(members, key=lambda seq: (self._batch[seq.request_id], seq.id))


class Bucketed(Continuous):
    """Sequences of similar length start together: lengths of one step's starts differ by at most `bucket_size`.

    The head of the queue always goes first and chooses the bucket: of all ranges of that width around its length, the
    one with the most of its peers, who are of the same tier (class and boosts) and deadline. Only these may pass
    anybody, who starts in a later step. Behind them whoever is next joins, as long as the lengths stay similar.
    """

    def __init__(self, bucket_size: int) -> None:
        self._bucket_size = bucket_size

    def starts(self, waiting: WaitingQueue[W], running: Group, fits: Fits[W]) -> Iterator[W]:
        """The head and its peers of the bucket, then whoever is next and similar, until one has no room."""
        head = waiting.peek()
        if head is None or not fits(head):
            return
        peers = waiting.peers()
        shortest, longest = bucket_around(head.length, [seq.length for seq in peers], self._bucket_size)
        started = []
        for seq in peers:
            if shortest <= seq.length <= longest:
                if not fits(seq):
                    return
                started.append(seq.length)
                yield seq
        while (behind := waiting.peek()) and self._are_similar([*started, behind.length]) and fits(behind):
            started.append(behind.length)
            yield behind

    def _are_similar(self, lengths: SequenceOf[int]) -> bool:
        return max(lengths) - min(lengths) <= self._bucket_size


class MemoryAware(Continuous):
    """Only what memory holds to its very end starts: nothing that runs is ever short of it.

    `cost_mb` of the full lengths of all that run, and of all beams of their searches, stays within `limit_mb`; only a
    search whose beams together exceed it runs alone, since what they share makes it less. The head of the queue goes
    first; behind it, among its peers of the same tier (class and boosts) and deadline, the least memory goes first, and
    while the head does not fit, those of its peers that do may pass. Whoever of its class comes one boost later is
    never its peer, so what it waits for is not taken for ever. What exceeds the limit alone is refused when it arrives.
    """

    def __init__(self, cost_mb: Cost, limit_mb: float) -> None:
        self._cost_mb = cost_mb
        self._limit_mb = limit_mb

    def check(self, seq: Waiter) -> None:
        """Refuse what exceeds the limit alone."""
        need = self._cost_mb([seq.max_len])
        if need > self._limit_mb:
            raise RequestTooLarge(
                f"a batch of this one alone, {seq.max_len} tokens, needs {need:,.1f} MiB and memory_limit_mb is "
                f"{self._limit_mb:,.1f}: ask for fewer tokens, or raise the limit"
            )

    def permits(self, seq: Waiter, running: Group, leaving: Group = ()) -> bool:
        """Whether the limit holds with it, to the end of everybody."""
        gone = {other.id for other in leaving}
        staying = [other for other in running if other.id not in gone]
        if seq.width > 1 and all(other.request_id == seq.request_id for other in staying):
            return True
        return self._cost_mb(full_lengths([*staying, seq])) <= self._limit_mb

    def starts(self, waiting: WaitingQueue[W], running: Group, fits: Fits[W]) -> Iterator[W]:
        """The head, then its peers by memory until one has no room; the next tier once all of one have started."""
        while peers := waiting.peers():
            head, *rest = peers
            is_held_up = not fits(head)
            if not is_held_up:
                yield head
            for seq in sorted(rest, key=lambda seq: seq.max_len):
                if not fits(seq):
                    return
                yield seq
            if is_held_up:
                return


def full_lengths(seqs: Iterable[Waiter]) -> list[int]:
    """The lengths of these at their ends, and of the beams that their searches lack."""
    lengths: list[int] = []
    lacking: dict[str, list[int]] = {}
    for seq in seqs:
        lengths.append(seq.max_len)
        if seq.width > 1:
            lacking.setdefault(seq.request_id, [seq.max_len] * seq.width).pop()
    return lengths + [length for mates in lacking.values() for length in mates]


def bucket_around(length: int, lengths: SequenceOf[int], width: int) -> tuple[int, int]:
    """The range [low, low + width] that holds `length` and the most of `lengths`; of several, the lowest."""
    near = sorted(other for other in [length, *lengths] if abs(other - length) <= width)
    lows = dict.fromkeys(other for other in near if other <= length)
    low = max(lows, key=lambda low: bisect_right(near, low + width) - bisect_left(near, low))
    return low, low + width


def paged_mb(block_size: int, bytes_per_token: int, weight_bytes: int) -> Cost:
    """MiB of weights, and of K/V in whole blocks. Shared prefixes are counted for everyone, so it is the most."""

    def cost_mb(lengths: SequenceOf[int]) -> float:
        blocks = sum(-(-length // block_size) for length in lengths)
        return (weight_bytes + blocks * block_size * bytes_per_token) / MIB

    return cost_mb


def strategy_of(config: EngineConfig) -> BatchingStrategy:
    """The strategy that the settings come to."""
    if not config.enable_continuous_batching:
        return BatchingStrategy.NAIVE
    return config.batching_strategy if config.enable_dynamic_batching else BatchingStrategy.CONTINUOUS


def engine_packing(
    config: EngineConfig, limits: Limits, capacity: int, bytes_per_token: int, weight_bytes: int
) -> Packing:
    """The packing that the settings ask for; `capacity` is how many tokens the K/V cache holds."""
    cost_mb = paged_mb(config.block_size, bytes_per_token, weight_bytes)
    limit_mb = (weight_bytes + capacity * bytes_per_token) / MIB
    makers: dict[BatchingStrategy, Callable[[], Packing]] = {
        BatchingStrategy.NAIVE: lambda: Naive(lambda: limits.max_running),
        BatchingStrategy.BUCKETED: lambda: Bucketed(config.bucket_size),
        BatchingStrategy.MEMORY_AWARE: lambda: MemoryAware(cost_mb, min(config.memory_limit_mb or math.inf, limit_mb)),
        BatchingStrategy.CONTINUOUS: Continuous,
    }
    return makers[strategy_of(config)]()

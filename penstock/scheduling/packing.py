"""`Packing`: which waiting sequences start together. One object per strategy, made with its scheduler.

Owns the meaning of the four batching strategies, for the engine and for `DynamicBatcher` alike. Never starts, moves or
changes a sequence. Called by `StepPlanner` and `DynamicBatcher`, which ask `permits` before any start and follow
`select`.
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
from penstock.scheduling.policy import Queued
from penstock.scheduling.queue import WaitingQueue

MIB = 1 << 20
W = TypeVar("W", bound=Queued)
HasRoom = Callable[[W], bool]
Cost = Callable[[SequenceOf[int]], float]  # MiB of a batch, from the lengths of its sequences


class Group(Protocol):
    """The running ones: a `RunningSet`, or a list."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Queued]: ...


class Packing(Protocol):
    """A strategy. `running` are the running sequences, `leaving` those of them that would be displaced."""

    def check(self, seq: Queued) -> None:
        """Raise `RequestTooLarge` for what `permits` would refuse even alone, so that nothing waits in vain."""
        ...

    def permits(self, seq: Queued, running: Group, leaving: Group = ()) -> bool:
        """Whether a waiting sequence may join the running ones, however much room there is."""
        ...

    def select(self, waiting: WaitingQueue[W], running: Group, has_room: HasRoom[W]) -> Iterator[W]:
        """The sequences that start in this step, one by one; the caller starts each before it asks for the next.

        `has_room` says whether there is room now, and includes `permits`; it held for each sequence when it was
        yielded.
        """
        ...


class Continuous:
    """The next in the queue starts as soon as there is room; nothing passes the head of the queue."""

    def check(self, seq: Queued) -> None:
        """Refuse nothing."""

    def permits(self, seq: Queued, running: Group, leaving: Group = ()) -> bool:
        """Always."""
        return True

    def select(self, waiting: WaitingQueue[W], running: Group, has_room: HasRoom[W]) -> Iterator[W]:
        """The queue in order, until there is no room for one."""
        while (seq := waiting.peek()) is not None and has_room(seq):
            yield seq


class Naive(Continuous):
    """Static batches: the best of the queue when nothing runs; nothing joins until the whole batch is done.

    A batch starts in the queue's order, over as many steps as the budget takes. Its victims come back to it, as do
    further samples and beams of its requests. This is the one strategy in which a higher class waits for a lower one,
    because a static batch cannot be joined.
    """

    def __init__(self, max_batch_size: Callable[[], int]) -> None:
        self._max_batch_size = max_batch_size
        self._batch: dict[str, int] = {}  # position of each request in the batch
        self._started: set[str] = set()

    def permits(self, seq: Queued, running: Group, leaving: Group = ()) -> bool:
        """Members of the current batch."""
        return seq.request_id in self._batch

    def select(self, waiting: WaitingQueue[W], running: Group, has_room: HasRoom[W]) -> Iterator[W]:
        """The waiting members, best first; a new batch once nothing runs and no member that started waits."""
        self._started.update(seq.request_id for seq in running)  # a higher class may have been started before this
        members = self._members(waiting)
        if not running and not any(seq.request_id in self._started for seq in members):
            request_ids = dict.fromkeys(seq.request_id for seq in waiting.best(self._max_batch_size()))
            self._batch = {request_id: position for position, request_id in enumerate(request_ids)}
            self._started.clear()
            members = self._members(waiting)
        for seq in members:
            if not has_room(seq):
                return
            self._started.add(seq.request_id)
            yield seq

    def _members(self, waiting: WaitingQueue[W]) -> list[W]:
        members = [seq for seq in waiting if seq.request_id in self._batch]
        return sorted(members, key=lambda seq: (self._batch[seq.request_id], seq.id))


class Bucketed(Continuous):
    """Sequences of similar length start together: the lengths of one step's starts differ by at most `bucket_size`.

    The head of the queue always goes first and determines the bucket: of all ranges of that width around its length,
    the one with the most of its peers, which are of the same tier (class and boosts) and deadline. Only these may pass
    sequences that start in a later step. After them the next in the queue joins, as long as the lengths stay similar.
    """

    def __init__(self, bucket_size: int) -> None:
        self._bucket_size = bucket_size

    def select(self, waiting: WaitingQueue[W], running: Group, has_room: HasRoom[W]) -> Iterator[W]:
        """The head and its peers of the bucket, then the next in the queue while similar, until there is no room."""
        head = waiting.peek()
        if head is None or not has_room(head):
            return
        peers = waiting.peers()
        low, high = bucket_around(head.length, [seq.length for seq in peers], self._bucket_size)
        lengths: list[int] = []
        for seq in peers:
            if low <= seq.length <= high:
                if not has_room(seq):
                    return
                lengths.append(seq.length)
                yield seq
        while (successor := waiting.peek()) and self._are_similar([*lengths, successor.length]) and has_room(successor):
            lengths.append(successor.length)
            yield successor

    def _are_similar(self, lengths: SequenceOf[int]) -> bool:
        return max(lengths) - min(lengths) <= self._bucket_size


class MemoryAware(Continuous):
    """Only what memory holds until it ends starts, so nothing that runs ever lacks memory.

    `cost_mb` of the full lengths of everything that runs, and of all beams of its searches, stays within `limit_mb`;
    only a search whose beams together exceed it runs alone, since the prefix they share makes it less. The head of the
    queue goes first; after it, among its peers of the same tier (class and boosts) and deadline, the smallest goes
    first, and while the head does not fit, peers that do fit may pass. A sequence of its class that is one boost behind
    is never its peer, so the head does not wait for ever. What exceeds the limit alone is refused on arrival.
    """

    def __init__(self, cost_mb: Cost, limit_mb: float) -> None:
        self._cost_mb = cost_mb
        self._limit_mb = limit_mb

    def check(self, seq: Queued) -> None:
        """Refuse what exceeds the limit alone."""
        cost_mb = self._cost_mb([seq.max_len])
        if cost_mb > self._limit_mb:
            raise RequestTooLarge(
                f"a batch of this request alone, {seq.max_len} tokens, needs {cost_mb:,.1f} MiB, and the limit is "
                f"{self._limit_mb:,.1f}: ask for fewer tokens"
            ).with_hint("To allow more, raise memory_limit_mb.")

    def permits(self, seq: Queued, running: Group, leaving: Group = ()) -> bool:
        """Whether the limit holds with it until everything has ended."""
        leaving_ids = {victim.id for victim in leaving}
        staying = [member for member in running if member.id not in leaving_ids]
        if seq.width > 1 and all(member.request_id == seq.request_id for member in staying):
            return True
        return self._cost_mb(full_lengths([*staying, seq])) <= self._limit_mb

    def select(self, waiting: WaitingQueue[W], running: Group, has_room: HasRoom[W]) -> Iterator[W]:
        """The head, then its peers by memory until there is no room; the next tier once all of one have started."""
        while peers := waiting.peers():
            head, *followers = peers
            is_held_up = not has_room(head)
            if not is_held_up:
                yield head
            for seq in sorted(followers, key=lambda seq: seq.max_len):
                if not has_room(seq):
                    return
                yield seq
            if is_held_up:
                return


def full_lengths(seqs: Iterable[Queued]) -> list[int]:
    """The maximum lengths of these sequences, and of the beams that their searches still lack."""
    lengths: list[int] = []
    missing_beams: dict[str, list[int]] = {}
    for seq in seqs:
        lengths.append(seq.max_len)
        if seq.width > 1:
            missing_beams.setdefault(seq.request_id, [seq.max_len] * seq.width).pop()
    return lengths + [length for beams in missing_beams.values() for length in beams]


def bucket_around(length: int, lengths: SequenceOf[int], width: int) -> tuple[int, int]:
    """The range [low, low + width] that contains `length` and the most of `lengths`; the lowest of several."""
    near = sorted(candidate for candidate in [length, *lengths] if abs(candidate - length) <= width)
    lows = dict.fromkeys(candidate for candidate in near if candidate <= length)
    low = max(lows, key=lambda low: bisect_right(near, low + width) - bisect_left(near, low))
    return low, low + width


def paged_mb(block_size: int, bytes_per_token: int, weight_bytes: int) -> Cost:
    """MiB of weights, and of K/V in whole blocks. An upper bound: shared prefixes count for every sequence."""

    def cost_mb(lengths: SequenceOf[int]) -> float:
        num_blocks = sum(-(-length // block_size) for length in lengths)
        return (weight_bytes + num_blocks * block_size * bytes_per_token) / MIB

    return cost_mb


def strategy_of(config: EngineConfig) -> BatchingStrategy:
    """The strategy that the settings select."""
    if not config.enable_continuous_batching:
        return BatchingStrategy.NAIVE
    return config.batching_strategy if config.enable_dynamic_batching else BatchingStrategy.CONTINUOUS


def engine_packing(
    config: EngineConfig, limits: Limits, capacity: int, bytes_per_token: int, weight_bytes: int
) -> Packing:
    """The packing of the settings; `capacity` is the number of tokens that the K/V cache holds."""
    cost_mb = paged_mb(config.block_size, bytes_per_token, weight_bytes)
    limit_mb = (weight_bytes + capacity * bytes_per_token) / MIB
    makers: dict[BatchingStrategy, Callable[[], Packing]] = {
        BatchingStrategy.NAIVE: lambda: Naive(lambda: limits.resolve().max_running),
        BatchingStrategy.BUCKETED: lambda: Bucketed(config.bucket_size),
        BatchingStrategy.MEMORY_AWARE: lambda: MemoryAware(cost_mb, min(config.memory_limit_mb or math.inf, limit_mb)),
        BatchingStrategy.CONTINUOUS: Continuous,
    }
    return makers[strategy_of(config)]()

"""`WaitingQueue`: the waiting sequences, best first, with keys that change while they wait.

Owns one heap per class with lazy deletion, and one heap of the times at which keys change. Never changes a sequence.
Called by `LiveSequences`, `StepPlanner`, `DynamicBatcher` and the packings.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Generic, TypeVar

from penstock.scheduling.policy import Key, Policy, Queued

W = TypeVar("W", bound=Queued)
_SLACK = 64  # stale entries that are not worth a rebuild


class WaitingQueue(Generic[W]):
    """An entry is valid while its version is the sequence's latest; stale entries are skipped, and dropped in bulk."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._queued: dict[int, tuple[int, W]] = {}
        self._heaps: dict[int, list[tuple[Key, int, W]]] = {}
        self._changes: list[tuple[float, int, W]] = []
        self._num_entries = 0
        self._version = 0

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._queued

    def __iter__(self) -> Iterator[W]:
        """The waiting sequences in no particular order."""
        return (seq for _, seq in self._queued.values())

    def push(self, seq: W, now: float) -> None:
        """Add a sequence, or refresh the key of one that is queued."""
        self._version += 1
        self._queued[seq.id] = (self._version, seq)
        heap = self._heaps.setdefault(self._policy.rank(seq), [])
        heapq.heappush(heap, (self._policy.waiting_key(seq, now), self._version, seq))
        heapq.heappush(self._changes, (self._policy.next_change(seq, now), self._version, seq))
        self._num_entries += 1
        if max(self._num_entries, len(self._changes)) > 2 * len(self._queued) + _SLACK:
            self._rebuild(now)

    def advance(self, now: float) -> None:
        """Refresh the keys that have changed by `now`."""
        while self._changes and self._changes[0][0] <= now:
            _, version, seq = heapq.heappop(self._changes)
            if self._is_valid(version, seq):
                self.push(seq, now)

    def peek(self, above: int | None = None) -> W | None:
        """The best sequence, or the best one of a class strictly above `above`; None when there is none."""
        heads = [self._head(heap) for rank, heap in self._heaps.items() if above is None or rank > above]
        best = min((head for head in heads if head is not None), default=None)
        return None if best is None else best[2]

    def best(self, count: int) -> list[W]:
        """The best `count` sequences, in order."""
        return [entry[2] for entry in heapq.nsmallest(count, self._entries())]

    def peers(self) -> list[W]:
        """The best sequence and, in order, those of its tier and deadline: a packing may reorder these."""
        entries = self._entries()
        if not entries:
            return []
        tier_and_deadline = min(entries)[0][:2]
        return [entry[2] for entry in sorted(entry for entry in entries if entry[0][:2] == tier_and_deadline)]

    def top_rank(self) -> float:
        """The highest class in the queue; minus infinity when it is empty."""
        return max((rank for rank, heap in self._heaps.items() if self._head(heap)), default=-math.inf)

    def pop(self) -> W:
        """Take the best sequence out."""
        seq = self.peek()
        assert seq is not None, "pop from an empty queue"
        self.remove(seq.id)
        return seq

    def remove(self, seq_id: int) -> bool:
        """Take a sequence out; False when it is not queued."""
        was_queued = self._queued.pop(seq_id, None) is not None
        if not self._queued:
            self._clear()  # keep no ended sequence alive
        return was_queued

    def change_policy(self, policy: Policy, now: float) -> None:
        """Order the queue by another policy."""
        self._policy = policy
        self._rebuild(now)

    def _entries(self) -> list[tuple[Key, int, W]]:
        return [entry for heap in self._heaps.values() for entry in heap if self._is_valid(entry[1], entry[2])]

    def _is_valid(self, version: int, seq: W) -> bool:
        entry = self._queued.get(seq.id)
        return entry is not None and entry[0] == version

    def _head(self, heap: list[tuple[Key, int, W]]) -> tuple[Key, int, W] | None:
        while heap and not self._is_valid(heap[0][1], heap[0][2]):
            heapq.heappop(heap)
            self._num_entries -= 1
        return heap[0] if heap else None

    def _rebuild(self, now: float) -> None:
        waiting = list(self)
        self._clear()
        for seq in waiting:
            self.push(seq, now)

    def _clear(self) -> None:
        self._heaps.clear()
        self._changes.clear()
        self._num_entries = 0

"""`Deadlines`: which sequences run out of time next.

Owns a heap with lazy deletion over the finite deadlines, so that asking costs nothing when there are none. Never
ends a sequence. Called by `Scheduler`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from penstock.sequence import Sequence

_SLACK = 64  # stale entries that are not worth a rebuild


class Deadlines:
    """Entries of sequences that were forgotten are skipped, and dropped in bulk."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bool, Sequence]] = []
        self._live: set[int] = set()

    def add(self, seq: Sequence) -> None:
        """Watch a sequence, if it has a deadline at all."""
        for when, is_ttft in ((seq.deadline, False), (seq.ttft_deadline, True)):
            if when < math.inf:
                heapq.heappush(self._heap, (when, seq.id, is_ttft, seq))
                self._live.add(seq.id)

    def forget(self, seq_id: int) -> None:
        """Stop watching."""
        self._live.discard(seq_id)
        if not self._live:
            self._heap.clear()  # nothing that ended is kept alive
        elif len(self._heap) > 4 * len(self._live) + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)

    def due(self, now: float) -> Iterator[Sequence]:
        """Take out and yield those whose deadline is not after `now`; first-token ones only while there is none."""
        while self._heap and self._heap[0][0] <= now:
            _, seq_id, is_ttft, seq = heapq.heappop(self._heap)
            if seq_id in self._live and not (is_ttft and seq.num_generated):
                yield seq

    @property
    def next_time(self) -> float:
        """The earliest time at which something may be due; infinity for never."""
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

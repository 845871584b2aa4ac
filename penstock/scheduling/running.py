"""`RunningSet`: the running sequences, kept sorted best first.

Owns their order, which changes only when one comes or goes. Never changes a sequence. Called by `Scheduler`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

from penstock.scheduling.policy import Key
from penstock.sequence import Sequence


class RunningSet:
    """Parallel lists of keys and sequences. `ranks` are the classes they defend: minus the first of the key."""

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._sequences: list[Sequence] = []
        self._key_of: dict[int, Key] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._key_of

    def add(self, seq: Sequence, key: Key) -> None:
        """Insert at its place."""
        i = bisect_left(self._keys, key)
        self._keys.insert(i, key)
        self._sequences.insert(i, seq)
        self._key_of[seq.id] = key

    def remove(self, seq_id: int) -> None:
        """Take one out."""
        i = bisect_left(self._keys, self._key_of.pop(seq_id))
        del self._keys[i]
        del self._sequences[i]

    def rank(self, seq: Sequence) -> int:
        """The class this sequence defends."""
        return -self._key_of[seq.id][0]

    def lowest_rank(self) -> float:
        """The class that the worst one defends; infinity when nobody runs."""
        return -self._keys[-1][0] if self._keys else math.inf

    def unplanned(self) -> Iterator[Sequence]:
        """Worst first, those that have no row in the step."""
        return (seq for seq in reversed(self._sequences) if not seq.in_flight)

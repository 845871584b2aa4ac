"""`Copies`: the block copies of the step being planned, and the references that keep their sources alive.

Owns which copy reads which block. Never takes a block itself and never copies content. Called by `CacheManager`.
"""

from __future__ import annotations

from penstock.cache.pool import BlockPool


class Copies:
    """Copies of one step run in any order, before anything is written: none may read what another writes."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._sources: dict[int, int] = {}  # by destination
        self._holds: dict[int, int] = {}

    def num_users(self, block: int) -> int:
        """How many tables name this block; holds do not count, since copies have run before anybody writes."""
        return self._pool.refs(block) - self._holds.get(block, 0)

    def add(self, source: int, destination: int) -> None:
        """Plan a copy. The reference of the table that names `source` no longer becomes a hold on its content."""
        self._holds[source] = self._holds.get(source, 0) + 1
        self._sources[destination] = self._sources.get(source, source)

    def take(self) -> tuple[tuple[int, int], ...]:
        """The (source, destination) pairs since the last call."""
        pairs = tuple((source, destination) for destination, source in self._sources.items())
        self._sources.clear()
        return pairs

    def let_go(self) -> None:
        """The step is over: drop the holds, and copies that nobody took."""
        for block, count in self._holds.items():
            for _ in range(count):
                self._pool.free(block)
        self._holds.clear()
        self._sources.clear()

    def holds(self) -> dict[int, int]:
        """Number of holds by block."""
        return dict(self._holds)

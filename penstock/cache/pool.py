"""`BlockPool`: reference counts of the K/V blocks, and the order in which free ones are taken; `Copies` of a step.

Owns two intrusive lists over the free blocks: empty ones, taken first, and cached ones, whose content can still be
found, least recently used first. Never knows what a block contains and never copies content. Called by `CacheManager`
and `PrefixCache`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

Pairs = tuple[tuple[int, int], ...]


class BlockPool:
    """`num_blocks` blocks, numbered from 0, all empty at first. Every operation is O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_cached_free = 0
        self._refs = array("i", bytes(4 * num_blocks))
        self._cached = bytearray(num_blocks)
        # Circular lists through two sentinels after the blocks; a block is linked if and only if it is free.
        self._empty, self._lru = num_blocks, num_blocks + 1
        self._next = array("i", range(1, num_blocks + 1)) + array("i", (0, self._lru))
        self._prev = array("i", range(-1, num_blocks)) + array("i", (self._lru,))
        self._prev[0] = self._empty
        self.num_empty = num_blocks

    @property
    def num_free(self) -> int:
        """Number of blocks without a reference, cached or not."""
        return self.num_empty + self.num_cached_free

    def refs(self, block: int) -> int:
        """Number of references to this block."""
        return self._refs[block]

    def is_cached(self, block: int) -> bool:
        """Whether the prefix cache can find the block's content."""
        return bool(self._cached[block])

    def is_private(self, block: int) -> bool:
        """Whether its holder may write it: there is one reference, and the prefix cache cannot find it."""
        return self._refs[block] == 1 and not self._cached[block]

    def take(self) -> int:
        """Hand out the next empty block with one reference. The caller evicts first when none is empty."""
        block = self._next[self._empty]
        assert block != self._empty, "no empty block"
        self._unlink(block)
        self._refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference; a free block leaves its list."""
        if self._refs[block] == 0:
            self._unlink(block)
        self._refs[block] += 1

    def free(self, block: int) -> None:
        """Drop a reference. The last one puts a cached block at the recent end, an empty one at the front."""
        self._refs[block] -= 1
        assert self._refs[block] >= 0, f"block {block} freed twice"
        if self._refs[block] == 0:
            self._link(block)

    def keep(self, block: int) -> None:
        """Mark the content of a referenced block as findable."""
        assert self._refs[block] > 0
        self._cached[block] = 1

    def forget(self, block: int) -> None:
        """Mark the content of a block as not findable; a free one counts as empty from here on."""
        is_free = self._refs[block] == 0
        if is_free:
            self._unlink(block)
        self._cached[block] = 0
        if is_free:
            self._link(block)

    def oldest(self) -> int:
        """The free cached block that was used least recently."""
        block = self._next[self._lru]
        assert block != self._lru, "no cached block is free"
        return block

    def free_blocks(self) -> Iterator[int]:
        """Every free block in the order in which it would be taken."""
        for sentinel in (self._empty, self._lru):
            block = self._next[sentinel]
            while block != sentinel:
                yield block
                block = self._next[block]

    def _link(self, block: int) -> None:
        if self._cached[block]:
            self.num_cached_free += 1
            self._link_before(self._lru, block)
        else:
            self.num_empty += 1
            self._link_before(self._next[self._empty], block)

    def _link_before(self, successor: int, block: int) -> None:
        predecessor = self._prev[successor]
        self._next[predecessor] = self._prev[successor] = block
        self._prev[block], self._next[block] = predecessor, successor

    def _unlink(self, block: int) -> None:
        predecessor, successor = self._prev[block], self._next[block]
        self._next[predecessor], self._prev[successor] = successor, predecessor
        if self._cached[block]:
            self.num_cached_free -= 1
        else:
            self.num_empty -= 1


class Copies:
    """The block copies of the step being planned, and the references that keep their sources alive until it is over.

    Copies of one step run in any order, before any row is written: no source may be another copy's destination.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._sources: dict[int, int] = {}  # by destination
        self._holds: dict[int, int] = {}  # number of references by source

    def num_users(self, block: int) -> int:
        """Number of block tables with this block. Holds do not count: copies have run before a table's owner writes."""
        return self._pool.refs(block) - self._holds.get(block, 0)

    def add(self, source: int, destination: int) -> None:
        """Plan a copy. The reference of the table that had `source` becomes a hold."""
        self._holds[source] = self._holds.get(source, 0) + 1
        self._sources[destination] = self._sources.get(source, source)

    def take(self) -> Pairs:
        """The (source, destination) pairs since the last call."""
        if not self._sources:
            return ()
        pairs = tuple((source, destination) for destination, source in self._sources.items())
        self._sources.clear()
        return pairs

    def release(self) -> bool:
        """Drop all holds and all copies that were not taken, after a step. Returns whether there were any."""
        if not self._holds:
            return False
        for block, count in self._holds.items():
            for _ in range(count):
                self._pool.free(block)
        self._holds.clear()
        self._sources.clear()
        return True

    def holds(self) -> dict[int, int]:
        """Number of holds by block."""
        return dict(self._holds)

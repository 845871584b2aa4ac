"""`BlockPool`: reference counts of the K/V blocks and the order in which free ones are taken.

Owns two intrusive lists over the free blocks: empty ones, taken first, and cached ones, whose content can still be
found, least recently used first. Never knows what a block holds. Called by `CacheManager` alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator


class BlockPool:
    """`num_blocks` blocks, numbered from 0, all empty at first. Every operation is O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_empty = 0
        self.num_cached_free = 0
        self._refs = array("i", bytes(4 * num_blocks))
        self._cached = bytearray(num_blocks)
        # Circular lists through two sentinels after the blocks; a block is linked if and only if it is free.
        self._empty, self._lru = num_blocks, num_blocks + 1
        self._next = array("i", range(num_blocks + 2))
        self._prev = array("i", range(num_blocks + 2))
        for block in range(num_blocks):
            self._link_before(self._empty, block)
        self.num_empty = num_blocks

    @property
    def num_free(self) -> int:
        """Number of blocks that nobody holds, cached or not."""
        return self.num_empty + self.num_cached_free

    def refs(self, block: int) -> int:
        """How many hold this block."""
        return self._refs[block]

    def is_cached(self, block: int) -> bool:
        """Whether the block's content is findable."""
        return bool(self._cached[block])

    def is_private(self, block: int) -> bool:
        """Whether its one holder may write it: nobody else holds it and nobody can find it."""
        return self._refs[block] == 1 and not self._cached[block]

    def take(self) -> int:
        """Hand out the next empty block with one reference. The caller evicts first when none is empty."""
        block = self._next[self._empty]
        assert block != self._empty, "no empty block"
        self._unlink(block)
        self._refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder; a free block leaves its list."""
        if self._refs[block] == 0:
            self._unlink(block)
        self._refs[block] += 1

    def free(self, block: int) -> None:
        """One holder less. The last one leaves a cached block at the recent end, an empty one to be taken next."""
        self._refs[block] -= 1
        assert self._refs[block] >= 0, f"block {block} freed twice"
        if self._refs[block] == 0:
            self._link(block)

    def keep(self, block: int) -> None:
        """The content of this block, which somebody holds, became findable."""
        assert self._refs[block] > 0
        self._cached[block] = 1

    def forget(self, block: int) -> None:
        """The content of this block is findable no more; a free one counts as empty from here on."""
        free = self._refs[block] == 0
        if free:
            self._unlink(block)
        self._cached[block] = 0
        if free:
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
        before = self._prev[successor]
        self._next[before] = self._prev[successor] = block
        self._prev[block], self._next[block] = before, successor

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        if self._cached[block]:
            self.num_cached_free -= 1
        else:
            self.num_empty -= 1

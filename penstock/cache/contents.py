"""`Contents`: what can be found of earlier work, in blocks of the pool and in the tier on the host.

Owns the prefix index, the tier, and the order in which blocks lose their content. Never writes a block table and never
touches a tensor. Called by `CacheManager` alone; what a step adds stays pending until `commit` or `rollback`.
"""

from __future__ import annotations

from collections.abc import Mapping

from penstock.cache.pool import BlockPool
from penstock.cache.prefix import Chains, PrefixIndex
from penstock.cache.readback import ReadBack
from penstock.cache.tier import HostTier, Moves
from penstock.sequence import Sequence
from penstock.step import StepPlan

ON_HOST = -1  # stands for a block whose content lies in the tier only


class Contents:
    """The settings are those of `CacheManager`."""

    def __init__(
        self, pool: BlockPool, block_size: int, *, shared: bool, max_cached: int | None, num_host_blocks: int
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_cached = pool.num_blocks if max_cached is None else max_cached
        self._index = PrefixIndex()
        self._tier = HostTier(num_host_blocks)
        self._read_back = ReadBack(block_size)
        self._pending: list[int] = []  # blocks whose content the step being planned or executed writes
        self._evictions = 0
        self.chains = Chains(self._index, block_size, shared)

    def __len__(self) -> int:
        """Number of blocks of the pool that can be found."""
        return len(self._index)

    def match(self, seq: Sequence) -> list[int]:
        """The blocks of the longest prefix that is worth sharing; ON_HOST for each that has to be read back."""
        chain, hits = self.chains.of(seq), list[int]()
        for i in range((seq.length - 1) // self._block_size):
            self.chains.extend(chain, seq, i + 1)
            block = self._index.get(chain[i + 1])
            if block is None and chain[i + 1] not in self._tier:
                break
            hits.append(ON_HOST if block is None else block)
        return self._worthwhile(hits)

    def take(self, keys: list[bytes], hits: list[int]) -> list[int]:
        """Share what is here of a match and read back the rest: its blocks.

        A block read back is findable at once, as what a step computes is.
        """
        for block in hits:
            if block != ON_HOST:
                self._pool.share(block)
        # Held first, so that making room for one evicts none of the others.
        self._tier.hold(key for key, block in zip(keys, hits, strict=True) if block == ON_HOST)
        return [self._fetch(key) if block == ON_HOST else block for key, block in zip(keys, hits, strict=True)]

    def put(self, key: bytes, block: int) -> None:
        """The step writes this content into a block; nothing happens where a block with it is known already."""
        if self._index.put(key, block):
            self._pool.keep(block)
            self._pending.append(block)

    def forget(self, block: int) -> bytes:
        """The content of this block can be found no more; its digest."""
        self._pool.forget(block)
        return self._index.remove(block)

    def fresh(self) -> int:
        """An empty block; where there is none, the content used least recently goes to the tier."""
        if not self._pool.num_empty:
            block = self._pool.oldest()
            self._tier.put(self._evict(), block)
        return self._pool.take()

    def trim(self) -> None:
        """Keep no more blocks than the settings allow once nobody holds them."""
        while self._pool.num_cached_free > self._max_cached:
            self._evict()

    def moves(self) -> tuple[Moves, Moves]:
        """What the step moves out to the host, as (block, place), and then in, as (place, block)."""
        return self._tier.moves()

    def learn(self, plan: StepPlan, timings_s: Mapping[str, float]) -> None:
        """Take in how long a step took, for the choice between reading back and computing again."""
        if self._tier.num_places:  # without a tier there is no choice, and steps of many rows are long to count
            self._read_back.learn(plan, timings_s)

    def commit(self) -> None:
        """The step ran: what it wrote and moved can be found from now on."""
        self._pending.clear()
        self._tier.commit()

    def rollback(self) -> None:
        """The step failed: what it would have written and moved cannot be found."""
        for block in self._pending:
            if self._pool.is_cached(block):
                self.forget(block)
        self._pending.clear()
        self._tier.rollback()

    def reset(self, weight_version: int | None) -> None:
        """Nothing can be found any more, under new weights or the same."""
        for block in list(self._index):
            self.forget(block)
        self._pending.clear()
        self._tier.clear()
        self.chains.forget()
        if weight_version is not None:
            self._index.weight_version = weight_version

    def drop_unused(self) -> None:
        """Forget what no sequence holds, here and in the tier."""
        while self._pool.num_cached_free:
            self._evict()
        self._tier.clear()

    def empty_places(self) -> list[int]:
        """The places of the tier that hold nothing any more."""
        return self._tier.empty_places()

    def stats(self) -> dict[str, float]:
        """Counts of blocks."""
        return {
            "num_entries": len(self),
            "evictions": self._evictions,
            "total_size": len(self) * self._block_size,
            "num_host_blocks": self._tier.num_places,
            "num_host_entries": len(self._tier),
            "swapped_out": self._tier.num_moved_out,
            "swapped_in": self._tier.num_moved_in,
        }

    def check(self) -> None:
        """Assert every invariant. For tests."""
        cached = {block for block in range(self._pool.num_blocks) if self._pool.is_cached(block)}
        assert set(self._index) == cached, "index and pool disagree"
        assert self._pool.num_cached_free == sum(not self._pool.refs(block) for block in cached) <= self._max_cached
        self._tier.check()

    def _worthwhile(self, hits: list[int]) -> list[int]:
        num_read, size = hits.count(ON_HOST), self._block_size
        if not num_read:
            return hits
        first = hits.index(ON_HOST)
        return hits if self._read_back.worth(num_read * size, (len(hits) - first) * size) else hits[:first]

    def _fetch(self, key: bytes) -> int:
        block = self.fresh()
        self._tier.read(key, block)
        self.put(key, block)
        return block

    def _evict(self) -> bytes:
        self._evictions += 1
        return self.forget(self._pool.oldest())

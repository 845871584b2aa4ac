"""`PrefixCache`: which earlier K/V can be found, in blocks of the pool and in the tier on the host.

Owns the prefix index, the tier, and the order in which blocks lose their content. Never writes a block table and never
touches a tensor. Called by `CacheManager` alone; what a step adds stays pending until `commit` or `rollback`.
"""

from __future__ import annotations

from collections.abc import Mapping

from penstock.cache.pool import BlockPool, Pairs
from penstock.cache.prefix import Chains, PrefixIndex
from penstock.cache.readback import ReadBack
from penstock.cache.tier import HostTier
from penstock.sequence import Sequence
from penstock.step import StepPlan

ON_HOST = -1  # stands for a block whose content is only in the tier


class PrefixCache:
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
        self.pending: list[int] = []  # blocks that the step being planned or executed fills
        self._num_evictions = 0
        self.chains = Chains(self._index, block_size, shared)

    def __len__(self) -> int:
        """Number of blocks of the pool that can be found."""
        return len(self._index)

    def match(self, seq: Sequence) -> list[int]:
        """The blocks of the longest prefix that is worth sharing; ON_HOST for each that has to be read back."""
        chain, hits = self.chains.of(seq), list[int]()
        for i in range(min(seq.length - 1, seq.max_cached) // self._block_size):
            self.chains.extend(chain, seq, i + 1)
            block = self._index.get(chain[i + 1])
            if block is None and chain[i + 1] not in self._tier:
                break
            hits.append(ON_HOST if block is None else block)
        return self._without_slow_reads(hits)

    def find(self, seq: Sequence, i: int) -> int | None:
        """The block of the pool with the content of the full block `i` of this sequence; None if there is none.

        All blocks before it are findable. Nor is there one where this step fills it: it cannot be copied yet.
        """
        chain = self.chains.of(seq)
        self.chains.extend(chain, seq, i + 1)
        block = self._index.get(chain[i + 1])
        return None if block in self.pending else block

    def take(self, keys: list[bytes], hits: list[int]) -> list[int]:
        """The blocks of a match: those of the pool are shared, the others are read back into fresh ones.

        A block that is read back can be found at once, like one that the step computes.
        """
        for block in hits:
            if block != ON_HOST:
                self._pool.share(block)
        # Hold all of them first, so that a fresh block for one evicts none of the others.
        if ON_HOST in hits:
            self._tier.hold(key for key, block in zip(keys, hits, strict=True) if block == ON_HOST)
        return [self._fetch(key) if block == ON_HOST else block for key, block in zip(keys, hits, strict=True)]

    def put(self, key: bytes, block: int) -> None:
        """Register a block that the step fills with this content, unless an equal one is registered."""
        if self._index.put(key, block):
            self._pool.keep(block)
            self.pending.append(block)

    def forget(self, block: int) -> bytes:
        """Unregister a block; returns its digest."""
        self._pool.forget(block)
        return self._index.remove(block)

    def fresh(self) -> int:
        """An empty block; if there is none, the content used least recently goes to the tier."""
        if not self._pool.num_empty:
            block = self._pool.oldest()
            self._tier.put(self._evict(), block)
        return self._pool.take()

    def trim(self) -> None:
        """Keep no more free blocks findable than the settings allow."""
        while self._pool.num_cached_free > self._max_cached:
            self._evict()

    def moves(self) -> tuple[Pairs, Pairs]:
        """What the step moves out to the host, as (block, place), and then in, as (place, block)."""
        return self._tier.moves() if self._tier.num_places else ((), ())

    def commit(self, plan: StepPlan | None = None, timings_s: Mapping[str, float] | None = None) -> None:
        """The step ran: what it filled and moved stays findable.

        Its timings, if there are any, inform the choice between reading back and computing again.
        """
        self.pending.clear()
        if self._tier.num_places:  # without a tier there is no choice, and a step of many rows takes long to count
            if plan is not None and timings_s:
                self._read_back.learn(plan, timings_s)
            self._tier.commit()
        self.trim()

    def rollback(self) -> None:
        """The step failed: what it would have filled and moved cannot be found."""
        for block in self.pending:
            if self._pool.is_cached(block):
                self.forget(block)
        self.pending.clear()
        self._tier.rollback()

    def reset(self, weight_version: int | None) -> None:
        """Make nothing findable any more, under new weights or the same."""
        for block in list(self._index):
            self.forget(block)
        self.pending.clear()
        self._tier.clear()
        self.chains.forget()
        if weight_version is not None:
            self._index.weight_version = weight_version

    def drop_unused(self) -> None:
        """Forget the blocks that no sequence holds, and the tier."""
        while self._pool.num_cached_free:
            self._evict()
        self._tier.clear()

    def empty_places(self) -> list[int]:
        """The places of the tier that no longer hold content."""
        return self._tier.empty_places()

    def stats(self) -> dict[str, float]:
        """Counts of blocks."""
        return {
            "num_entries": len(self),
            "evictions": self._num_evictions,
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

    def _without_slow_reads(self, hits: list[int]) -> list[int]:
        """The hits up to the first block on the host, unless reading back beats computing again."""
        num_read, size = hits.count(ON_HOST), self._block_size
        if not num_read:
            return hits
        start = hits.index(ON_HOST)
        return hits if self._read_back.pays_off(num_read * size, (len(hits) - start) * size) else hits[:start]

    def _fetch(self, key: bytes) -> int:
        block = self.fresh()
        self._tier.read(key, block)
        self.put(key, block)
        return block

    def _evict(self) -> bytes:
        self._num_evictions += 1
        return self.forget(self._pool.oldest())

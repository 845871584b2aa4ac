"""`CacheManager`: block tables of sequences over one pool, with prefix sharing, copy-on-write and a tier on the host.

Owns `Sequence.blocks`, the pool and the prefix cache. Never touches a tensor: copies and moves are only listed for the
plan. Called by the scheduler on the engine's thread; a step's effects stay pending until `commit` or `rollback`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from penstock.cache.pool import BlockPool, Copies, Pairs
from penstock.cache.prefix_cache import ON_HOST, PrefixCache
from penstock.sequence import Sequence
from penstock.step import StepPlan


class BlockMoves(NamedTuple):
    """What a step does before its rows run, in this order: swaps out, swaps in, copies.

    `copies` are (source, destination) blocks, of which no destination is also a source; `swaps_out` are (block, place
    on the host), `swaps_in` (place, block).
    """

    copies: Pairs
    swaps_out: Pairs
    swaps_in: Pairs


@dataclass(slots=True)
class _Table:
    """State of a sequence that holds blocks.

    `chain` holds the root digest and then one per full block; None once the weights changed under its K/V, which other
    sequences may not use from then on. The first `num_sealed` blocks are registered, or equal to one that is.
    """

    chain: list[bytes] | None
    num_sealed: int


class CacheManager:
    """`num_blocks` blocks of `block_size` tokens.

    At most `max_cached_blocks` free blocks stay findable (None: as many as fit). Without prefix caching only the
    sequences of one request share blocks. Blocks evicted for want of room go to a tier of `num_host_blocks` blocks on
    the host, and are read back where that beats computing them again.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        max_cached_blocks: int | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._prefix = PrefixCache(
            self._pool,
            block_size,
            shared=enable_prefix_caching,
            max_cached=max_cached_blocks,
            num_host_blocks=num_host_blocks,
        )
        self._tables: dict[int, _Table] = {}
        self._has_tier = num_host_blocks > 0
        self._copies = Copies(self._pool)
        self._num_hit_tokens = self._num_query_tokens = 0

    @property
    def capacity(self) -> int:
        """Number of tokens that fit if one sequence has all blocks."""
        return self.num_blocks * self.block_size

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that no sequence holds; some of them may be findable."""
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - self._pool.num_free / self.num_blocks

    def lookup(self, seq: Sequence) -> int:
        """How many tokens are in the blocks that `attach` would share. Changes nothing."""
        return len(self._prefix.match(seq)) * self.block_size

    def fits(self, seq: Sequence, spare: int = 0) -> bool:
        """Whether `attach` and then `reserve` of all its tokens would leave `spare` free blocks. Changes nothing."""
        hits = [block for block in self._prefix.match(seq) if block != ON_HOST]
        num_free_hits = sum(self._pool.refs(block) == 0 for block in hits)
        return self._num_blocks(seq.length) - len(hits) + num_free_hits + spare <= self._pool.num_free

    def num_freed_by(self, sequences: Iterable[Sequence]) -> int:
        """How many blocks would become free if all these sequences released theirs."""
        counts = Counter(block for seq in sequences for block in seq.blocks)
        return sum(self._pool.refs(block) == count for block, count in counts.items())

    def attach(self, seq: Sequence) -> int:
        """Give a sequence without blocks, which `fits`, every block that it can share or have read back.

        Returns the number of tokens whose K/V are in them, or copied into one. At least the newest token is left to
        compute, because its logits are needed, and whatever comes after the sequence's `max_cached` tokens.
        """
        assert not seq.blocks
        hits = self._prefix.match(seq)
        chain = self._prefix.chains.of(seq)[: len(hits) + 1]
        seq.blocks.extend(self._prefix.take(chain[1:], hits))
        computed = max(len(hits) * self.block_size, self._share_tail(seq, len(hits)))
        if (len(hits) + 1) * self.block_size <= len(seq.tokens) and computed == len(hits) * self.block_size:
            computed += self._copy_tail(seq, len(hits))
        self._tables[seq.id] = _Table(chain, len(hits))
        self._num_query_tokens += seq.length
        self._num_hit_tokens += computed
        return computed

    def fork(self, parent: Sequence, child: Sequence) -> int:
        """Share the parent's settled blocks with a child without blocks that begins with the same tokens.

        The first sequence to write a shared block copies it. Returns the number of the child's tokens in those blocks.
        """
        assert not child.blocks
        computed = min(parent.computed, child.length - 1)
        assert child.tokens[:computed] == parent.tokens[:computed]
        self._take_shares(child, parent.blocks[: self._num_blocks(computed)])
        table = self._tables[parent.id]
        num_full = min(computed // self.block_size, table.num_sealed)
        self._tables[child.id] = _Table(table.chain and table.chain[: num_full + 1], num_full)
        return computed

    def reserve(self, seq: Sequence, end: int) -> bool:
        """Make the uncomputed positions < `end` writable. Returns False, without a change, for want of blocks."""
        blocks, pool = seq.blocks, self._pool
        start, stop = (seq.computed + seq.in_flight) // self.block_size, -(-end // self.block_size)
        if start + 1 == stop == len(blocks) and pool.is_private(blocks[start]):
            return True  # the usual case: a decode within its last block
        unwritable = [i for i in range(start, min(stop, len(blocks))) if not pool.is_private(blocks[i])]
        num_missing = stop - len(blocks)
        if num_missing <= 0 and not unwritable:
            return True
        shared = [i for i in unwritable if self._copies.num_users(blocks[i]) > 1]
        if len(shared) + max(num_missing, 0) > pool.num_free:
            return False
        for i in unwritable:
            self._make_private(seq, i, i in shared)
        for _ in range(num_missing):
            blocks.append(self._prefix.fresh())
        return True

    def has_slot(self, seq: Sequence) -> bool:
        """Whether the first uncomputed position can be written without `reserve`, and completes no block."""
        i, slot = divmod(seq.computed, self.block_size)
        blocks = seq.blocks
        return slot + 1 < self.block_size and i < len(blocks) and self._pool.is_private(blocks[i])

    def seal(self, seq: Sequence, end: int) -> None:
        """Make every block findable that positions < `end` fill; `end` is at most the number of tokens.

        A step's K/V are written before they are read, so later rows of the same step may share them already.
        """
        table = self._tables[seq.id]
        num_full = end // self.block_size
        if num_full <= table.num_sealed or table.chain is None:
            return
        self._prefix.chains.extend(table.chain, seq, num_full)
        for i in range(table.num_sealed, num_full):
            self._prefix.put(table.chain[i + 1], seq.blocks[i])
        table.num_sealed = num_full

    def take_moves(self) -> BlockMoves:
        """What this step does before its rows run. Copies are returned once; swaps until `commit` or `rollback`."""
        return BlockMoves(self._copies.take(), *(self._prefix.moves() if self._has_tier else ((), ())))

    def commit(self, plan: StepPlan | None = None, timings_s: Mapping[str, float] | None = None) -> None:
        """The step ran: what it sealed stays findable, and sources of copies are released.

        The plan and its timings inform the choice between reading blocks back and computing them again.
        """
        if self._copies.release() or self._prefix.pending or self._has_tier:
            self._prefix.commit(plan, timings_s)

    def rollback(self) -> None:
        """The step failed: what it would have written is not findable; sources of copies are released."""
        self._prefix.rollback()
        self.commit()

    def release(self, seq: Sequence) -> None:
        """Drop all blocks of a sequence, after which its tokens may change. Full ones stay findable.

        They are freed in reverse, so that the end of a prefix is evicted before its beginning.
        """
        self._prefix.chains.forget(seq)
        for block in reversed(seq.blocks):
            self._pool.free(block)
        del seq.blocks[:]
        self._tables.pop(seq.id, None)
        self._prefix.trim()

    def reset(self, weight_version: int | None = None) -> None:
        """Make nothing findable any more, under new weights or the same. Sequences keep their blocks."""
        self._prefix.reset(weight_version)
        for table in self._tables.values():
            table.chain = None

    def drop_unused(self) -> None:
        """Forget the cached blocks that no sequence holds, and all those on the host."""
        self._prefix.drop_unused()

    def unused(self) -> tuple[list[int], list[int]]:
        """The blocks, and the places on the host that were used before, whose content is neither held nor findable."""
        return list(islice(self._pool.free_blocks(), self._pool.num_empty)), self._prefix.empty_places()

    def stats(self) -> dict[str, float]:
        """Counts of blocks (num_*, swapped_*, evictions) and tokens (*_tokens, total_size); usage, hit_rate 0 to 1."""
        return {
            **self._prefix.stats(),
            "num_blocks": self.num_blocks,
            "num_free_blocks": self.num_free_blocks,
            "usage": self.usage,
            "hit_tokens": self._num_hit_tokens,
            "query_tokens": self._num_query_tokens,
            "hit_rate": self._num_hit_tokens / self._num_query_tokens if self._num_query_tokens else 0.0,
        }

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert every invariant, given all sequences that may hold blocks. For tests."""
        refs, ids = Counter(self._copies.holds()), set()
        for seq in sequences:
            ids.add(seq.id)
            assert len(set(seq.blocks)) == len(seq.blocks), f"sequence {seq.id} names a block twice"
            assert not seq.blocks or seq.id in self._tables
            refs.update(seq.blocks)
        assert self._tables.keys() <= ids, "a table outlived its sequence"
        free = list(self._pool.free_blocks())
        assert len(set(free)) == len(free) == self._pool.num_free, "the free lists are damaged"
        assert {b for b in range(self.num_blocks) if not refs[b]} == set(free), "a block leaked or is free and held"
        assert all(self._pool.refs(b) == refs[b] for b in range(self.num_blocks)), "a reference count is wrong"
        self._prefix.check()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _share_tail(self, seq: Sequence, num_hits: int) -> int:
        """Share what a live parent has settled of this prompt beyond the full blocks of the match."""
        parent = seq.parent
        if parent is None or not self._same_root(parent, seq):
            return 0
        limit = min(parent.computed, seq.prompt_len, seq.length - 1, seq.max_cached)
        if limit <= num_hits * self.block_size or seq.tokens[:limit] != parent.tokens[:limit]:
            return 0
        self._take_shares(seq, parent.blocks[num_hits : self._num_blocks(limit)])
        return limit

    def _copy_tail(self, seq: Sequence, num_hits: int) -> int:
        """Copy the block after the hits, if it is findable: only its first tokens may be a cached prefix.

        The rest is computed again, in the copy, so the block stays findable. Needs a block more than the sequence until
        the step is over. Returns the number of tokens of the block that need not be computed.
        """
        num_tokens = min(seq.length - 1, seq.max_cached) - num_hits * self.block_size
        block = self._prefix.find(seq, num_hits) if 0 < num_tokens < self.block_size else None
        if block is None or self._pool.num_free < self._num_blocks(seq.length) - num_hits + 1:
            return 0
        self._pool.share(block)
        seq.blocks.append(self._prefix.fresh())
        self._copies.add(block, seq.blocks[-1])
        return num_tokens

    def _same_root(self, parent: Sequence, seq: Sequence) -> bool:
        table = self._tables.get(parent.id)
        return table is not None and table.chain is not None and table.chain[0] == self._prefix.chains.of(seq)[0]

    def _take_shares(self, seq: Sequence, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._pool.share(block)
            seq.blocks.append(block)

    def _make_private(self, seq: Sequence, i: int, shared: bool) -> None:
        block = seq.blocks[i]
        if shared:
            seq.blocks[i] = self._prefix.fresh()
            self._copies.add(block, seq.blocks[i])
        elif self._pool.is_cached(block):
            self._prefix.forget(block)

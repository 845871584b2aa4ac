"""`CacheManager`: block tables of sequences over one pool, with prefix sharing, copy-on-write and a tier on the host.

Owns `Sequence.blocks`, the pool and what can be found of its contents. Never touches a tensor: copies and moves are
only named, for the plan. Called by `Scheduler` on the engine's thread; a step's effects stay pending until `commit` or
`rollback`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from penstock.cache.contents import ON_HOST, Contents
from penstock.cache.copies import Copies
from penstock.cache.pool import BlockPool
from penstock.cache.tier import Moves
from penstock.sequence import Sequence
from penstock.step import StepPlan


@dataclass(slots=True)
class _Table:
    """What the manager remembers of a sequence that holds blocks.

    `chain` holds the root digest and then one per full block; None once the weights changed under its K/V, which
    nobody else may use from then on. The first `sealed` blocks are registered, or equal to one that is.
    """

    chain: list[bytes] | None
    sealed: int


class CacheManager:
    """`num_blocks` blocks of `block_size` tokens.

    At most `max_cached_blocks` blocks stay findable after their last holder left (None: as many as fit). Without
    prefix caching only the sequences of one request share. What is evicted for want of room goes to a tier of
    `num_host_blocks` blocks on the host, and is read back where that beats computing it again.
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
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._contents = Contents(
            self._pool,
            block_size,
            shared=enable_prefix_caching,
            max_cached=max_cached_blocks,
            num_host_blocks=num_host_blocks,
        )
        self._tables: dict[int, _Table] = {}
        self._copies = Copies(self._pool)
        self._hit_tokens = self._query_tokens = 0

    @property
    def capacity(self) -> int:
        """Number of tokens that fit when one sequence has everything."""
        return self.num_blocks * self.block_size

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that no sequence holds; some may still be findable."""
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - self._pool.num_free / self.num_blocks

    def lookup(self, seq: Sequence) -> int:
        """How many tokens `attach` would find for this sequence. Changes nothing."""
        return len(self._match(seq)) * self.block_size

    def fits(self, seq: Sequence, spare: int = 0) -> bool:
        """Whether `attach` and then `reserve` of all its tokens would leave `spare` free blocks. Changes nothing."""
        hits = [block for block in self._match(seq) if block != ON_HOST]
        revived = sum(self._pool.refs(block) == 0 for block in hits)
        return self._num_blocks(seq.length) - len(hits) + revived + spare <= self._pool.num_free

    def num_freed_by(self, sequences: Iterable[Sequence]) -> int:
        """How many blocks would become free if these all released theirs."""
        held = Counter(block for seq in sequences for block in seq.blocks)
        return sum(self._pool.refs(block) == count for block, count in held.items())

    def attach(self, seq: Sequence) -> int:
        """Give an empty-handed sequence that `fits` every block it can share, and those that are read back for it.

        Returns the number of tokens computed thereby. At least the newest token is left to compute, since its logits
        are wanted; with prompt logprobs, all are.
        """
        assert not seq.blocks
        hits = self._match(seq)
        chain = self._contents.chains.of(seq)[: len(hits) + 1]
        seq.blocks.extend(self._contents.take(chain[1:], hits))
        computed = max(len(hits) * self.block_size, self._share_tail(seq, len(hits)))
        self._tables[seq.id] = _Table(chain, len(hits))
        self._query_tokens += seq.length
        self._hit_tokens += computed
        return computed

    def fork(self, parent: Sequence, child: Sequence) -> int:
        """Share the parent's settled blocks with an empty-handed child that begins with the same tokens.

        Whoever writes a shared block first copies it. Returns the number of the child's tokens computed thereby.
        """
        assert not child.blocks
        computed = min(parent.computed, child.length - 1)
        assert child.tokens[:computed] == parent.tokens[:computed]
        self._take_shares(child, parent.blocks[: self._num_blocks(computed)])
        table = self._tables[parent.id]
        full = min(computed // self.block_size, table.sealed)
        self._tables[child.id] = _Table(table.chain and table.chain[: full + 1], full)
        return computed

    def reserve(self, seq: Sequence, end: int) -> bool:
        """Make positions < `end` writable from the first uncomputed one on. False, unchanged, for lack of blocks."""
        blocks, pool = seq.blocks, self._pool
        first, stop = (seq.computed + seq.in_flight) // self.block_size, -(-end // self.block_size)
        if first + 1 == stop == len(blocks) and pool.is_private(blocks[first]):
            return True  # decoding, mostly
        held = range(first, min(stop, len(blocks)))
        taken = [i for i in held if not pool.is_private(blocks[i])]
        missing = stop - len(blocks)
        if missing <= 0 and not taken:
            return True
        shared = [i for i in taken if self._copies.num_users(blocks[i]) > 1]
        if len(shared) + max(missing, 0) > pool.num_free:
            return False
        for i in taken:
            self._make_private(seq, i, i in shared)
        for _ in range(missing):
            blocks.append(self._contents.fresh())
        return True

    def has_slot(self, seq: Sequence) -> bool:
        """Whether the first uncomputed position can be written as things are, and completes no block."""
        i, slot = divmod(seq.computed, self.block_size)
        blocks = seq.blocks
        return slot + 1 < self.block_size and i < len(blocks) and self._pool.is_private(blocks[i])

    def seal(self, seq: Sequence, end: int) -> None:
        """Make findable every block that positions < `end` complete, end being at most the number of tokens.

        A step's K/V are written before they are read, so later rows of the same step may share them already.
        """
        table = self._tables[seq.id]
        full = end // self.block_size
        if full <= table.sealed or table.chain is None:
            return
        self._contents.chains.extend(table.chain, seq, full)
        for i in range(table.sealed, full):
            self._contents.put(table.chain[i + 1], seq.blocks[i])
        table.sealed = full

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The (source, destination) copies of this step. No destination is also a source."""
        return self._copies.take()

    def moves(self) -> tuple[Moves, Moves]:
        """What this step moves to the host, as (block, place), and then back, as (place, block): before all else."""
        return self._contents.moves()

    def learn(self, plan: StepPlan, timings_s: Mapping[str, float]) -> None:
        """Take in how long a step took, for the choice between reading back and computing again."""
        self._contents.learn(plan, timings_s)

    def commit(self) -> None:
        """The step ran: what it sealed stays findable, sources of copies are let go."""
        self._contents.commit()
        self._copies.let_go()
        self._contents.trim()

    def rollback(self) -> None:
        """The step failed: what it would have written is not findable; sources of copies are let go."""
        self._contents.rollback()
        self.commit()

    def release(self, seq: Sequence) -> None:
        """Drop all of a sequence's blocks; its tokens may change then. Full ones stay findable, its last ones first."""
        self._contents.chains.forget(seq)
        for block in reversed(seq.blocks):
            self._pool.free(block)
        del seq.blocks[:]
        self._tables.pop(seq.id, None)
        self._contents.trim()

    def reset(self, weight_version: int | None = None) -> None:
        """Make nothing findable any more, under new weights or the same. Sequences keep the blocks they hold."""
        self._contents.reset(weight_version)
        for table in self._tables.values():
            table.chain = None

    def drop_unused(self) -> None:
        """Forget what no sequence holds, here and on the host: the next requests find nothing of it."""
        self._contents.drop_unused()

    def unused(self) -> tuple[list[int], list[int]]:
        """The blocks, and the places used once on the host, whose content nobody holds and nobody can find."""
        return list(islice(self._pool.free_blocks(), self._pool.num_empty)), self._contents.empty_places()

    def stats(self) -> dict[str, float]:
        """Counts of blocks (num_*, swapped_*, evictions) and tokens (*_tokens, total_size); usage, hit_rate 0 to 1."""
        return {
            **self._contents.stats(),
            "num_blocks": self.num_blocks,
            "num_free_blocks": self.num_free_blocks,
            "usage": self.usage,
            "hit_tokens": self._hit_tokens,
            "query_tokens": self._query_tokens,
            "hit_rate": self._hit_tokens / self._query_tokens if self._query_tokens else 0.0,
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
        self._contents.check()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _match(self, seq: Sequence) -> list[int]:
        return [] if seq.params.prompt_logprobs is not None else self._contents.match(seq)

    def _share_tail(self, seq: Sequence, num_hits: int) -> int:
        """Share what a live parent has settled of this prompt beyond the full blocks found."""
        parent = seq.parent
        if parent is None or seq.params.prompt_logprobs is not None or not self._same_root(parent, seq):
            return 0
        limit = min(parent.computed, seq.prompt_len, seq.length - 1)
        if limit <= num_hits * self.block_size or seq.tokens[:limit] != parent.tokens[:limit]:
            return 0
        self._take_shares(seq, parent.blocks[num_hits : self._num_blocks(limit)])
        return limit

    def _same_root(self, parent: Sequence, seq: Sequence) -> bool:
        table = self._tables.get(parent.id)
        return table is not None and table.chain is not None and table.chain[0] == self._contents.chains.of(seq)[0]

    def _take_shares(self, seq: Sequence, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._pool.share(block)
            seq.blocks.append(block)

    def _make_private(self, seq: Sequence, i: int, shared: bool) -> None:
        block = seq.blocks[i]
        if shared:
            seq.blocks[i] = self._contents.fresh()
            self._copies.add(block, seq.blocks[i])
        elif self._pool.is_cached(block):
            self._contents.forget(block)

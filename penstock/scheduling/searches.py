"""`Searches`: what the commit of a beam's row means, for its own sequence and for the others of its search.

Owns which sequences are whose beams, and writes their tokens: a beam becomes the continuation of another by sharing its
blocks. Never plans: a beam that has to wait for others gives its place back. Called by `Scheduler.commit`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from penstock.cache.manager import CacheManager
from penstock.optimizers.beams import BeamSearch, Move
from penstock.scheduling.news import News
from penstock.scheduling.roster import Roster
from penstock.sequence import FinishReason, Sequence, Status
from penstock.step import Event, TokenLogprobs

Ended = tuple[Sequence, FinishReason, Exception | None]


@dataclass(frozen=True, slots=True, eq=False)
class Beams:
    """A search and its sequences, one for each slot. They end together."""

    search: BeamSearch
    members: SequenceOf[Sequence]


class Searches:
    """Keeps a search from `add` until its first sequence ends.

    `preempt` puts a running sequence back into the queue, `close` forgets one; both are the scheduler's.
    """

    def __init__(
        self,
        cache: CacheManager,
        roster: Roster,
        news: News,
        preempt: Callable[[Sequence, float], None],
        close: Callable[[Sequence, FinishReason], None],
    ) -> None:
        self._cache = cache
        self._roster = roster
        self._news = news
        self._preempt = preempt
        self._close = close
        self._slots: dict[int, tuple[Beams, int]] = {}
        self._reported: dict[int, Beams] = {}  # heard of in this step, by the id of their first sequence

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._slots

    def num_expected(self, leaving: Collection[Sequence] = ()) -> int:
        """Beams to come of searches whose first sequence computes its prompt, but for those of `leaving`."""
        firsts = (beams.members[0] for beams, slot in self._slots.values() if not slot)
        computing = (seq for seq in firsts if seq.status is Status.RUNNING and not seq.num_generated)
        return sum(seq.width - 1 for seq in computing if seq not in leaving)

    def add(self, beams: Beams) -> None:
        """A new search, whose first sequence is in the queue and whose others nobody knows yet."""
        self._slots.update((seq.id, (beams, slot)) for slot, seq in enumerate(beams.members))
        self._roster.hold(beams.members[1:])

    def drop(self, seq: Sequence) -> SequenceOf[Sequence]:
        """A sequence ended. Returns those that have to end with it: the beams of its search, if that still runs."""
        if seq.id not in self._slots:
            return ()
        beams, _ = self._slots[seq.id]
        for member in beams.members:
            del self._slots[member.id]
        self._reported.pop(beams.members[0].id, None)
        return beams.members

    def report(self, seq_id: int, candidates: SequenceOf[TokenLogprobs]) -> None:
        """What a beam's row found; of a search that broke in this very step it is ignored."""
        if seq_id in self._slots:
            beams, slot = self._slots[seq_id]
            beams.search.report(slot, candidates)
            self._reported[beams.members[0].id] = beams

    def settle(self, weight_version: int) -> tuple[list[Event], list[Ended]]:
        """Take every search that was heard of as far as it goes: events of those that are over, and what failed."""
        events: list[Event] = []
        failed: list[Ended] = []
        reported, self._reported = self._reported, {}
        for beams in reported.values():
            if not beams.search.is_ready:
                self._wait(beams)
                continue
            try:
                moves = beams.search.advance()
            except Exception as error:  # somebody's stop strings
                failed.append((beams.members[0], FinishReason.ERROR, error))
                continue
            events += self._go_on(beams, moves) if moves else self._conclude(beams, weight_version)
        return events, failed

    def _wait(self, beams: Beams) -> None:
        """Some beams were not in the step. The others hold no blocks meanwhile, so that those find room for sure."""
        for slot in beams.search.reported:
            self._rest(beams.members[slot])

    def _rest(self, seq: Sequence) -> None:
        if seq.status is Status.RUNNING:
            self._preempt(seq, self._roster.now)
            self._roster.waiting.remove(seq.id)

    def _go_on(self, beams: Beams, moves: SequenceOf[Move]) -> SequenceOf[Event]:
        for move in moves:
            self._continue(beams.members[move.slot], beams.members[move.source], move.token)
        for slot in set(range(len(beams.members))) - {move.slot for move in moves}:
            self._rest(beams.members[slot])
        return ()

    def _continue(self, seq: Sequence, source: Sequence, token: int) -> None:
        """Make a beam the continuation of `source`; they share blocks if both have places."""
        if seq is source:
            seq.tokens.append(token)
        else:
            self._cache.release(seq)
            seq.tokens[:] = [*source.tokens, token]
            shares = seq.status is source.status is Status.RUNNING
            seq.computed = self._cache.fork(source, seq) if shares else 0
        if seq.status is Status.WAITING:
            self._roster.requeue(seq)
        elif not seq.blocks:
            self._preempt(seq, self._roster.now)

    def _conclude(self, beams: Beams, weight_version: int) -> list[Event]:
        """Each sequence ends as one of the texts found, the first as the best one."""
        self.drop(beams.members[0])
        events = []
        for slot, seq in enumerate(beams.members):
            hypothesis = beams.search.outcome(slot)
            entries = () if hypothesis is None else hypothesis.chain.entries()
            reason = FinishReason.STOP if hypothesis is None else hypothesis.reason
            seq.tokens[seq.prompt_len :] = [entry.token for entry in entries]
            self._close(seq, reason)
            stop = None if hypothesis is None else hypothesis.stop
            events.append(self._news.whole(seq, entries, reason, stop, weight_version))
        return events

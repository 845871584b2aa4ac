"""`Searches`: what a committed step means for the beams of a search.

Owns which sequences are whose beams, and writes their tokens: a beam becomes the continuation of another one by sharing
its blocks. Never plans: a beam that has to wait for others gives its blocks back. Called by `Scheduler` and
`StepPlanner`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from penstock.cache.manager import CacheManager
from penstock.optimizers.beam_search import BeamSearch, Move
from penstock.scheduling.events import EventBuilder
from penstock.scheduling.live import LiveSequences
from penstock.sequence import FinishReason, Sequence, Status
from penstock.step import Event, TokenLogprobs

Ending = tuple[Sequence, FinishReason, Exception | None]
Report = tuple[int, SequenceOf[TokenLogprobs]]  # id of a beam, and the candidates that its row yielded


@dataclass(frozen=True, slots=True, eq=False)
class Beams:
    """A search and its sequences, one for each slot. They end together.

    `weight_versions` holds, for each generated position, the version of the weights whose step completed it.
    """

    search: BeamSearch
    members: SequenceOf[Sequence]
    weight_versions: list[int] = field(default_factory=list)


class Searches:
    """Keeps a search from `add` until its first sequence ends."""

    def __init__(self, cache: CacheManager, live: LiveSequences, events: EventBuilder) -> None:
        self._cache = cache
        self._live = live
        self._events = events
        self._slots: dict[int, tuple[Beams, int]] = {}

    def num_expected(self, leaving: Collection[Sequence] = ()) -> int:
        """Number of beams to come of searches whose prompt is being computed, except those of `leaving`."""
        if not self._slots:
            return 0
        leaders = (beams.members[0] for beams, slot in self._slots.values() if not slot)
        prefilling = (seq for seq in leaders if seq.status is Status.RUNNING and not seq.num_generated)
        return sum(seq.width - 1 for seq in prefilling if seq not in leaving)

    def add(self, beams: Beams) -> None:
        """Add a search whose first sequence is in the queue; the other beams are withheld."""
        self._slots.update((seq.id, (beams, slot)) for slot, seq in enumerate(beams.members))
        self._live.withhold(beams.members[1:])

    def remove(self, seq: Sequence) -> SequenceOf[Sequence]:
        """End the search of a sequence, if it has one: returns the beams, which have to end together."""
        if seq.id not in self._slots:
            return ()
        beams, _ = self._slots[seq.id]
        for member in beams.members:
            del self._slots[member.id]
        return beams.members

    def advance(self, reports: Iterable[Report], weight_version: int) -> tuple[list[Event], list[Ending]]:
        """Take in the candidates of a step, and carry every search on that has them all.

        Returns the events of searches that are over, and the first sequences of those that failed. Reports of a search
        that was removed in this very step are ignored.
        """
        reported: dict[int, Beams] = {}
        for seq_id, candidates in reports:
            if seq_id in self._slots:
                beams, slot = self._slots[seq_id]
                beams.search.report(slot, candidates)
                reported[beams.members[0].id] = beams
        events: list[Event] = []
        failures: list[Ending] = []
        for beams in reported.values():
            if not beams.search.is_ready:
                # Some beams were not in the step. The others hold no blocks meanwhile, so that those find room.
                self._suspend(beams, beams.search.reported)
                continue
            beams.weight_versions.append(weight_version)
            try:
                moves = beams.search.advance()
            except Exception as error:  # of a caller's stop strings
                failures.append((beams.members[0], FinishReason.ERROR, error))
                continue
            if moves:
                self._carry_on(beams, moves)
            else:
                events += self._conclude(beams)
        return events, failures

    def forget_reports(self) -> None:
        """The weights were changed: beams that wait for others of their search compute their candidates again."""
        leaders = [beams for beams, slot in self._slots.values() if not slot]
        for beams in leaders:
            for slot in beams.search.forget_reports():
                self._live.enqueue(beams.members[slot])

    def _suspend(self, beams: Beams, slots: Iterable[int]) -> None:
        for slot in slots:
            self._live.suspend(beams.members[slot])

    def _carry_on(self, beams: Beams, moves: SequenceOf[Move]) -> None:
        for move in moves:
            self._continue(beams.members[move.slot], beams.members[move.source], move.token)
        self._suspend(beams, set(range(len(beams.members))) - {move.slot for move in moves})

    def _continue(self, seq: Sequence, source: Sequence, token: int) -> None:
        """Make a beam the continuation of `source`; they share blocks if both run."""
        if seq is source:
            seq.tokens.append(token)
        else:
            self._cache.release(seq)
            seq.tokens[:] = [*source.tokens, token]
            shares = seq.status is source.status is Status.RUNNING
            seq.computed = self._cache.fork(source, seq) if shares else 0
        if seq.status is Status.WAITING:
            self._live.enqueue(seq)
        elif not seq.blocks:
            self._live.preempt(seq)

    def _conclude(self, beams: Beams) -> list[Event]:
        """End each sequence with one of the resulting hypotheses, the first one with the best."""
        self.remove(beams.members[0])
        events = []
        for slot, seq in enumerate(beams.members):
            hypothesis = beams.search.outcome(slot)
            entries = () if hypothesis is None else hypothesis.chain.entries()
            reason = FinishReason.STOP if hypothesis is None else hypothesis.reason
            stop = None if hypothesis is None else hypothesis.stop
            seq.tokens[seq.prompt_len :] = [entry.token for entry in entries]
            self._live.finish(seq, reason)
            versions = tuple(beams.weight_versions[: len(entries)])
            events.append(self._events.of_hypothesis(seq, entries, reason, stop, versions))
        return events

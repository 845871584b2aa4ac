"""`StepPlanner`: plans the rows of one step within its `Budget`. Both die with the step.

Owns the step's rows and what is left of its tokens, rows and logit rows. Takes blocks, starts and preempts sequences,
and never samples or ends one. Made and called once by `Scheduler.plan`.
"""

from __future__ import annotations

from collections.abc import Collection

from penstock.cache.manager import CacheManager
from penstock.scheduling.events import EventBuilder
from penstock.scheduling.limits import StepLimits
from penstock.scheduling.live import LiveSequences
from penstock.scheduling.packing import Packing
from penstock.scheduling.searches import Searches
from penstock.sequence import Sequence, Status
from penstock.step import NO_POSITIONS, Row


class Budget:
    """What is left of a step. `reserved` holds back one token with its logits for each decoding sequence yet to come.

    A logit row is a position whose logits are computed. Scores take half of them at most, which leaves the memory of
    the other half to the temporary tensors of scoring.
    """

    __slots__ = ("logit_rows", "reserved", "rows", "scored_rows", "tokens")

    def __init__(self, tokens: int, rows: int, logit_rows: int | None, num_decoding: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self.logit_rows = tokens if logit_rows is None else logit_rows
        self.scored_rows = max(1, self.logit_rows // 2)
        self.reserved = min(num_decoding, self.tokens, self.rows, self.logit_rows)

    def is_open(self, num_leaving: int = 0) -> bool:
        """Whether one more row gets a token with logits, if `num_leaving` decoding sequences left the step."""
        return min(self.tokens, self.rows, self.logit_rows) > max(0, self.reserved - num_leaving)

    def release_reserved(self) -> None:
        """Free the token held back for a decoding sequence, because its turn has come or it left the step."""
        if self.reserved:
            self.reserved -= 1

    def spend_reserved(self) -> bool:
        """Spend a token that is held back for a decoding sequence, with its logits; False if there is none."""
        if not self.reserved:
            return False
        self.reserved -= 1
        self.tokens -= 1
        self.rows -= 1
        self.logit_rows -= 1
        return True

    def grant(self, num_todo: int, num_without_logits: int, scores: bool = False) -> int:
        """How many of `num_todo` tokens a row gets; 0 for none. Those after the first `num_without_logits` need logits.

        `scores` says whether these are for scores.
        """
        if not self.rows:
            return 0
        logit_rows = self.logit_rows - self.reserved
        if scores:
            logit_rows = min(logit_rows, self.scored_rows)
        return max(0, min(num_todo, self.tokens - self.reserved, num_without_logits + logit_rows))

    def spend(self, tokens: int, logit_rows: int, scored_rows: int = 0) -> None:
        """Take one planned row off; `scored_rows` of its logit rows are for scores."""
        self.tokens -= tokens
        self.rows -= 1
        self.logit_rows -= logit_rows
        self.scored_rows -= scored_rows


class StepPlanner:
    """Fills `rows` best-first; `started` are the sequences that the step starts for the first time.

    `is_constrained` says whether any row has a constraint.
    """

    def __init__(
        self,
        live: LiveSequences,
        cache: CacheManager,
        packing: Packing,
        searches: Searches,
        events: EventBuilder,
        limits: StepLimits,
        max_logit_rows: int | None,
    ) -> None:
        self.rows: list[Row] = []
        self.started: list[Sequence] = []
        self.is_constrained = False
        self._live = live
        self._cache = cache
        self._packing = packing
        self._searches = searches
        self._events = events
        self._limits = limits
        self._budget = self._new_budget(max_logit_rows)

    def plan(self) -> None:
        """Plan the running sequences, then the waiting ones, in the order of the packing."""
        live, num_preemptions = self._live, -1
        # Again where the step's last token was held back for a sequence that was preempted when its turn came.
        while not self.rows and live.num_preemptions != num_preemptions:
            num_preemptions = live.num_preemptions
            had_waiting = live.has_waiting()
            self._plan_running(had_waiting)
            # The second test is for victims. The first is for a queue that `_plan_above` emptied: a static batch has to
            # see what was started before its turn.
            if had_waiting or live.has_waiting():
                for seq in self._packing.select(live.waiting, live.running, self._has_room):
                    self._start(seq)

    def _new_budget(self, max_logit_rows: int | None) -> Budget:
        running, limits = self._live.running.sequences, self._limits
        prefilling = [seq for seq in running if seq.computed + 1 < len(seq.tokens)]
        num_decoding = len(running) - len(prefilling)
        num_tokens = limits.step_tokens
        if limits.tuned is not None:
            num_streamed = num_decoding + sum(len(seq.draft) for seq in running)
            num_tokens = limits.token_budget(num_streamed, prefilling[0].computed if prefilling else 0)
        return Budget(num_tokens, limits.max_batch_size, max_logit_rows, num_decoding)

    def _plan_running(self, has_waiting: bool) -> None:
        running, cache, budget, rows = self._live.running, self._cache, self._budget, self.rows
        is_outranked = has_waiting and running.lowest_rank() < self._live.waiting.top_rank()
        for seq in list(running.sequences):
            if is_outranked and seq.status is Status.RUNNING:
                is_outranked = self._plan_above(running.rank(seq))
            if seq.status is not Status.RUNNING or seq.in_flight:  # a victim may have started again in this step
                continue
            # Most rows of most steps: only the newest token is left, its slot exists, and its budget is held back.
            # Never the first sample, whose logits siblings may share.
            length = len(seq.tokens)
            is_decode = seq.computed + 1 == length > seq.prompt_len and not seq.draft
            if is_decode and cache.has_slot(seq) and budget.spend_reserved():
                fixed = (seq.params, seq.prompt_len, seq.stop_ids, seq.seed, seq.sample_index)
                last = ((), (), seq.constraint, NO_POSITIONS, seq.adapter)
                rows.append(Row(seq.id, seq.tokens, length - 1, length, seq.blocks, True, *fixed, *last))
                seq.in_flight = 1
                self.is_constrained |= seq.constraint is not None
                continue
            if seq.is_decoding:
                budget.release_reserved()
            self._extend(seq)

    def _plan_above(self, rank: int) -> bool:
        """Start waiting sequences of a class above `rank` before a running one of that rank gets its turn.

        They may displace lower classes, but never take room that the head of the queue waits for. False once one
        cannot start.
        """
        waiting = self._live.waiting
        while (seq := waiting.peek(above=rank)) is not None:
            head = waiting.peek()
            if head is not None and self._has_room(head):
                seq = head
            elif not self._make_room(seq):
                return False
            self._start(seq)
        return True

    def _make_room(self, seq: Sequence) -> bool:
        """Displace lower classes, worst first, until a waiting sequence can start; none if that is not enough."""
        rank, running = self._live.policy.rank(seq), self._live.running
        lower = [victim for victim in running.unplanned() if running.rank(victim) < rank]
        if not self._has_room(seq, lower):
            return False
        for victim in lower:
            self._displace(victim)
            if self._has_room(seq):
                return True
        return False

    def _has_room(self, seq: Sequence, leaving: Collection[Sequence] = ()) -> bool:
        """Whether a waiting sequence can start in this step, if those in `leaving` gave up their blocks and rows.

        All its tokens must fit, and one more block for every running sequence, which may soon need it: without that
        margin the start would only cause a preemption a few steps later.
        """
        running = self._live.running
        num_staying = len(running.sequences) - len(leaving)
        if not self._has_row(seq, num_staying, self._searches.num_expected(leaving)):
            return False
        if not self._budget.is_open(sum(victim.is_decoding for victim in leaving)):
            return False
        if not self._cache.fits(seq, num_staying - self._cache.num_freed_by(leaving)):
            return False
        return self._packing.permits(seq, running, leaving)

    def _has_row(self, seq: Sequence, num_running: int, num_expected: int) -> bool:
        """Whether a waiting sequence may join the running ones and the beams that are expected.

        A sequence with output has started before: the tuner must not keep it out, and the other beams of its search may
        wait for it. A new one needs rows for all its beams, because beams that do not share a step are computed again;
        when nothing runs, it starts in any case.
        """
        limits = self._limits
        if seq.num_generated:
            return num_running < limits.max_batch_size
        has_rows = num_running + num_expected + seq.width <= limits.max_batch_size
        return not num_running or (has_rows and num_running < limits.max_running)

    def _start(self, seq: Sequence) -> None:
        """Start a waiting sequence. All its blocks are taken at once, so a started prefill never lacks any."""
        seq.computed = self._cache.attach(seq)
        if not self._cache.reserve(seq, seq.length):
            raise AssertionError("a sequence was started without room for it")
        if self._live.start(seq):
            self._events.note_start(seq)
            self.started.append(seq)
        self._extend(seq)

    def _extend(self, seq: Sequence) -> None:
        """Plan as many tokens of a running sequence as the budget allows; for want of blocks, preempt the worst."""
        live, scores = self._live, seq.is_scoring
        while num_tokens := self._budget.grant(seq.todo, _num_without_logits(seq, scores), scores):
            if self._cache.reserve(seq, seq.computed + num_tokens):
                self._add_row(seq, num_tokens)
                return
            if seq.draft:
                seq.draft = ()  # a draft is not worth a preemption
                continue
            victim = next(live.running.unplanned())
            if victim is seq:
                live.preempt(seq, for_blocks=True)
                return
            self._displace(victim, for_blocks=True)

    def _add_row(self, seq: Sequence, num_tokens: int) -> None:
        """Add a row with the next tokens of a sequence whose blocks are reserved, and with its waiting siblings."""
        start, length = seq.computed, len(seq.tokens)
        end = start + num_tokens
        draft = seq.draft[: end - length] if end > length else ()
        samples = end >= length and seq.params.generates
        scored = range(max(seq.scored.start, start + 1), min(seq.scored.stop, end + 1)) if seq.scored else NO_POSITIONS
        self._budget.spend(num_tokens, len(scored) + (end - length + 1 if samples else 0), len(scored))
        siblings = self._live.siblings_of(seq) if samples else ()
        sibling_rows = tuple(_row(sibling, end, end, True) for sibling in siblings)
        self.rows.append(_row(seq, start, end, samples, draft, sibling_rows, scored))
        self.is_constrained |= seq.constraint is not None
        self._cache.seal(seq, min(end, length))
        seq.in_flight = num_tokens

    def _displace(self, victim: Sequence, *, for_blocks: bool = False) -> None:
        """Preempt a running sequence whose turn in this step has not come."""
        if victim.is_decoding:
            self._budget.release_reserved()
        self._live.preempt(victim, for_blocks=for_blocks)


def _num_without_logits(seq: Sequence, scores: bool) -> int:
    """How many of the next tokens come before the first one whose logits are needed."""
    if scores:
        return max(0, seq.scored.start - 1 - seq.computed)
    return seq.todo - len(seq.draft) - 1


def _row(
    seq: Sequence,
    start: int,
    end: int,
    samples: bool,
    draft: tuple[int, ...] = (),
    siblings: tuple[Row, ...] = (),
    scored: range = NO_POSITIONS,
) -> Row:
    fixed = (seq.params, seq.prompt_len, seq.stop_ids, seq.seed, seq.sample_index)
    last = (draft, siblings, seq.constraint, scored, seq.adapter)
    return Row(seq.id, seq.tokens, start, end, seq.blocks, samples, *fixed, *last)

"""`Scheduler`: decides what each step runs and what its result means for every sequence.

Owns the sequences' progress: tokens, draft, computed, in_flight, status. Never waits, asks no clock, touches no tensor.
Called by the engine's loop: plan, (execute), commit or fail; arrivals and aborts may come at any time in between.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.errors import RequestTooLarge
from penstock.scheduling.budget import Step, begin, has_room, is_decoding, takes_draft
from penstock.scheduling.limits import Limits
from penstock.scheduling.news import News, accept
from penstock.scheduling.overview import Overview
from penstock.scheduling.packing import Continuous, Packing
from penstock.scheduling.policy import Policy
from penstock.scheduling.roster import Roster
from penstock.scheduling.searches import Beams, Ended, Searches
from penstock.sequence import FinishReason, Sequence, Status
from penstock.step import Event, Row, RowResult, StepPlan, StepResult, paired

_LEGAL_MOVES = {
    Status.WAITING: (Status.RUNNING, Status.FINISHED),
    Status.RUNNING: (Status.WAITING, Status.FINISHED),
    Status.FINISHED: (),
}


class Scheduler(Overview):
    """Plans best-first within a step's tokens, rows and blocks; victims come from the other end of the same order.

    `policy` defaults to `AgingPolicy`, following the configuration; `packing` says who of the waiting start together.
    `limits` are read when a step begins. `max_logit_rows` bounds the positions of one step that need logits, and so
    their memory.
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: CacheManager,
        policy: Policy | None = None,
        *,
        max_logit_rows: int | None = None,
        limits: Limits | None = None,
        packing: Packing | None = None,
    ) -> None:
        self.limits = limits or Limits(config)
        self._packing = packing or Continuous()
        self._cache = cache
        self._max_logit_rows = max_logit_rows
        self._roster = Roster(config, policy)
        self._executing: StepPlan | None = None
        self._promised = 0  # blocks for guesses of the next step, beyond the one that each sequence is left
        self._started: list[Sequence] = []
        self._news = News()
        self._ending: dict[int, tuple[FinishReason, Exception | None]] = {}  # ends that await the executing step
        self._doomed: list[Ended] = []  # whom the end of others takes along
        self._searches = Searches(cache, self._roster, self._news, self._preempt, self._close)

    def add(self, seq: Sequence, now: float) -> None:
        """Queue a new sequence; one with a `parent` of its request that has drawn nothing yet draws with that one.

        Raises `RequestTooLarge` when it could never run, had it all memory for itself.
        """
        if seq.max_len > self._cache.capacity:
            raise RequestTooLarge(
                f"{seq.prompt_len} prompt tokens and {seq.max_len - seq.prompt_len} new ones are {seq.max_len}, and "
                f"the K/V cache holds {self._cache.capacity}: ask for less or raise memory_pool_size"
            )
        self._packing.check(seq)
        self._roster.add(seq, now)

    def search(self, beams: Beams, now: float) -> None:
        """Queue a beam search: its first sequence, which the others continue. As `add`."""
        self.add(beams.members[0], now)
        self._searches.add(beams)

    def abort(
        self, seq_id: int, reason: FinishReason = FinishReason.ABORT, error: Exception | None = None
    ) -> list[Event]:
        """End a sequence that nobody wants any more; as `finish`."""
        return self.finish(seq_id, reason, error)

    def finish(self, seq_id: int, reason: FinishReason, error: Exception | None = None) -> list[Event]:
        """End a sequence from outside. An id that is unknown or ended already means nothing.

        One in the executing step ends when the step does, without that step's tokens; its event comes from there.
        """
        seq = self._roster.live.get(seq_id)
        if seq is None:
            return []
        if seq.in_flight:
            self._ending.setdefault(seq_id, (reason, error))
            return []
        return [self._end(seq, reason, error), *self._end_doomed()]

    def expire(self, now: float) -> list[Event]:
        """End what passed its deadline, or its first-token deadline without a token. Free without deadlines."""
        return [
            event for seq in self._roster.deadlines.due(now) for event in self.finish(seq.id, FinishReason.DEADLINE)
        ]

    def offer(self, seq_id: int, draft: SequenceOf[int]) -> None:
        """Propose the next tokens of a sequence of `decoding()`; of any other it is ignored.

        It is cut to the blocks that are left when everybody else who runs had one more, and those offered before
        theirs.
        """
        seq = self._roster.live.get(seq_id)
        if seq is not None and takes_draft(seq):
            size, held = self._cache.block_size, len(seq.blocks)
            spare = max(0, self._cache.num_free_blocks - (self.num_running - 1) - self._promised)
            # The step adds one token of its own after the accepted ones.
            seq.draft = tuple(draft[: max(0, min((held + spare) * size, seq.max_len - 1) - seq.length)])
            self._promised += max(0, -(-(seq.length + len(seq.draft)) // size) - held - 1)

    def take_started(self) -> list[Sequence]:
        """The sequences that left the queue for the first time since the last call."""
        started, self._started = self._started, []
        return started

    def plan(self, now: float) -> StepPlan:
        """Decide the next step; without rows there is nothing to do and nothing to commit."""
        assert self._executing is None, "the last plan was neither committed nor failed"
        self._promised = 0
        self._roster.refresh(now)
        step = begin(now, self._roster.running, self.limits, self._max_logit_rows)
        self._plan_running(step)
        self._plan_waiting(step)
        plan = StepPlan(tuple(step.rows), self._cache.take_copies(), *self._cache.moves())
        self._executing = plan if plan.rows else None
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Take in what a step produced. A sequence has exactly one terminal event, and at most one of each step."""
        assert plan is self._executing or not plan.rows
        self._executing = None
        version = result.weight_version
        events = [self._settle(row, out, version) for row, out in paired(plan, result)]
        found, failed = self._searches.settle(version)
        self._doomed += failed
        self._cache.learn(plan, result.timings_s)
        self._cache.commit()
        return [*(event for event in events if event is not None), *found, *self._end_doomed()]

    def fail(self, plan: StepPlan, error: Exception) -> list[Event]:
        """The forward pass failed: end every sequence of the plan, and keep nothing that it might have written."""
        assert plan is self._executing or not plan.rows
        self._executing = None
        self._cache.rollback()
        events = []
        for row in plan.rows:
            seq = self._roster.live[row.seq_id]
            seq.in_flight = 0
            events.append(self._end(seq, *self._ending.pop(seq.id, (FinishReason.ERROR, error))))
        return events + self._end_doomed()

    def restart(self, plan: StepPlan) -> list[Event]:
        """The model became another one: nothing of the step counts, and every sequence's K/V are computed anew."""
        assert plan is self._executing
        self._executing = None
        self._cache.rollback()
        sequences = [self._roster.live[row.seq_id] for row in plan.rows]
        for seq in sequences:
            seq.in_flight = 0
        self._cache.reset()
        for seq in list(self._roster.running):
            self._preempt(seq, self._roster.now)
        leaving = [(seq, *self._ending.pop(seq.id)) for seq in sequences if seq.id in self._ending]
        return [self._end(*ending) for ending in leaving] + self._end_doomed()

    def _plan_running(self, step: Step) -> None:
        outranked = self._roster.running.lowest_rank() < self._roster.waiting.top_rank()
        for seq in list(self._roster.running):
            if outranked and seq.status is Status.RUNNING:
                outranked = self._plan_above(step, self._roster.running.rank(seq))
            if seq.status is not Status.RUNNING or seq.in_flight:  # a victim may have found room again
                continue
            if step.decode(seq, self._cache):
                seq.in_flight = 1
                continue
            if is_decoding(seq):
                step.budget.claim()
            self._extend(step, seq)

    def _plan_above(self, step: Step, rank: int) -> bool:
        """Start waiting sequences of a class above `rank` before a running one of that rank gets its turn.

        They may take places of lower classes, but no room that the head of the queue waits for. False once one cannot.
        """
        waiting = self._roster.waiting
        while (seq := waiting.peek(above=rank)) is not None:
            head = waiting.peek()
            if head is not None and self._has_room(step, head):
                seq = head
            elif not self._make_room(step, seq):
                return False
            self._admit(step, seq)
        return True

    def _make_room(self, step: Step, seq: Sequence) -> bool:
        """Displace lower classes, worst first, until a waiting sequence can start; nobody if that would not do."""
        rank, running = self._roster.policy.rank(seq), self._roster.running
        lower = [victim for victim in running.unplanned() if running.rank(victim) < rank]
        if not self._has_room(step, seq, lower):
            return False
        for victim in lower:
            self._displace(step, victim)
            if self._has_room(step, seq):
                return True
        return False

    def _plan_waiting(self, step: Step) -> None:
        """Start waiting sequences, in the order of the packing."""
        roster = self._roster
        for seq in self._packing.starts(roster.waiting, roster.running, lambda seq: self._has_room(step, seq)):
            self._admit(step, seq)

    def _has_room(self, step: Step, seq: Sequence, leaving: SequenceOf[Sequence] = ()) -> bool:
        running, expected = self._roster.running, self._searches.num_expected(leaving)
        has_place = has_room(seq, step, running, self._cache, leaving, expected)
        return has_place and self._packing.permits(seq, running, leaving)

    def _admit(self, step: Step, seq: Sequence) -> None:
        """Start a waiting sequence. All its blocks are taken at once, so a started prefill never lacks any."""
        seq.computed = self._cache.attach(seq)
        if not self._cache.reserve(seq, seq.length):
            raise AssertionError("there was room for it")
        self._move(seq, Status.RUNNING)
        if self._roster.start(seq):
            self._news.start(seq)
            self._started.append(seq)
        self._extend(step, seq)

    def _extend(self, step: Step, seq: Sequence) -> None:
        """Plan as much of a running sequence as the budget allows; where blocks lack, the worst give way."""
        while num_tokens := step.grant(seq):
            end = seq.computed + num_tokens
            if self._cache.reserve(seq, end):
                step.add(seq, num_tokens, self._roster.siblings_of(seq))
                self._cache.seal(seq, min(end, len(seq.tokens)))
                seq.in_flight = num_tokens
                return
            if seq.draft:
                seq.draft = ()  # a guess is not worth anybody's blocks
                continue
            self._roster.num_shortages += 1
            victim = next(self._roster.running.unplanned())
            if victim is seq:
                self._preempt(seq, step.now)
                return
            self._displace(step, victim)

    def _displace(self, step: Step, victim: Sequence) -> None:
        """Preempt a running sequence whose turn in this step has not come."""
        if is_decoding(victim):
            step.budget.claim()
        self._preempt(victim, step.now)

    def _preempt(self, seq: Sequence, now: float) -> None:
        """Back to the queue with its tokens; its K/V are computed again, from what is still found of them."""
        self._cache.release(seq)
        seq.computed = 0
        seq.draft = ()
        self._move(seq, Status.WAITING)
        self._roster.stop(seq, now)

    def _settle(self, row: Row, out: RowResult, weight_version: int) -> Event | None:
        seq = self._roster.live.get(row.seq_id)
        if seq is None:
            return None  # a sibling, which holds nothing, ended meanwhile
        seq.in_flight = 0
        if seq.id in self._ending:
            return self._end(seq, *self._ending.pop(seq.id))
        if out.error is not None:
            return self._end(seq, FinishReason.ERROR, out.error)
        seq.draft = ()
        count, reason, stop_token = 0, None, None
        if row.samples and not out.candidates:
            assert 1 <= len(out.tokens) <= len(row.draft) + 1
            count, reason, stop_token = accept(seq, out.tokens)
            self._append(seq, out.tokens, count)
        else:
            seq.computed = row.end
            if out.candidates:
                self._searches.report(seq.id, out.candidates)
        if reason is not None:
            self._close(seq, reason)
        return self._news.of(row, out, count, reason, stop_token, weight_version)

    def _append(self, seq: Sequence, tokens: tuple[int, ...], count: int) -> None:
        """Accept `count` sampled tokens. All but the last were drafts, whose K/V the step has written."""
        if seq.status is Status.RUNNING:  # one that draws with another holds nothing yet
            seq.computed = len(seq.tokens)
        seq.tokens.extend(tokens[:count])
        self._roster.let_siblings_go(seq)
        if len(tokens) > 1:
            seq.computed += min(count, len(tokens) - 1)
            self._cache.seal(seq, seq.computed)

    def _end(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> Event:
        self._doomed += [(mate, reason, error) for mate in self._searches.drop(seq) if mate is not seq]
        self._close(seq, reason)
        return self._news.end(seq, reason, error)

    def _end_doomed(self) -> list[Event]:
        events: list[Event] = []
        while self._doomed:
            seq, reason, error = self._doomed.pop()
            events += self.finish(seq.id, reason, error)
        return events

    def _close(self, seq: Sequence, reason: FinishReason) -> None:
        """Forget a sequence that no executing plan names."""
        self._cache.release(seq)
        seq.draft = ()
        self._move(seq, Status.FINISHED, reason)
        self._roster.drop(seq)

    def _move(self, seq: Sequence, status: Status, reason: FinishReason | None = None) -> None:
        assert status in _LEGAL_MOVES[seq.status], f"{seq.status} to {status}"
        seq.status = status
        seq.reason = reason

"""`Scheduler`: decides what each step runs and what its result means for every sequence.

Owns the sequences' progress (tokens, draft, computed, in_flight) and the plan that executes. Never waits, reads no
clock, touches no tensor. Called by the engine's loop: plan, (execute), commit or fail; arrivals and aborts may come in
between.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.errors import RequestTooLarge
from penstock.scheduling.acceptance import Accepted, constrain
from penstock.scheduling.events import EventBuilder
from penstock.scheduling.limits import Limits
from penstock.scheduling.live import LiveSequences
from penstock.scheduling.packing import Continuous, Packing
from penstock.scheduling.planning import StepPlanner
from penstock.scheduling.policy import Policy
from penstock.scheduling.searches import Beams, Ending, Report, Searches
from penstock.sequence import FinishReason, Sequence, Status
from penstock.step import Event, Row, RowResult, StepPlan, StepResult


class Scheduler:
    """Plans best-first within a step's tokens, rows and blocks; victims come from the other end of the same order.

    `policy` defaults to `AgingPolicy`, following the configuration; `packing` says which waiting sequences start
    together. `limits` are resolved when a step begins; `step_limits` are those of the latest step. `max_logit_rows`
    bounds the positions of one step that need logits, and so their memory.
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
        self.step_limits = self.limits.resolve()
        self._packing = packing or Continuous()
        self._cache = cache
        self._max_logit_rows = max_logit_rows
        self._live = LiveSequences(config, cache, policy)
        self._events = EventBuilder()
        self._searches = Searches(cache, self._live, self._events)
        self._executing: StepPlan | None = None
        self._started: list[Sequence] = []
        self._num_draft_blocks = 0  # promised to drafts of the next step, beyond one for each running sequence
        self._endings: dict[int, tuple[FinishReason, Exception | None]] = {}  # that await the executing step
        self._beam_endings: list[Ending] = []  # of beams whose search has ended

    # Requests in and out.

    def add(self, seq: Sequence, now: float) -> None:
        """Queue a new sequence. It samples together with its `parent` if that has the same prompt and no output yet.

        Raises `RequestTooLarge` if it could not run even with the whole cache to itself.
        """
        if seq.max_len > self._cache.capacity:
            raise RequestTooLarge(
                f"{seq.prompt_len} prompt tokens and {seq.max_len - seq.prompt_len} new ones are {seq.max_len}, and "
                f"the K/V cache holds {self._cache.capacity}: ask for less"
            ).with_hint("To allow more, raise memory_pool_size.")
        self._packing.check(seq)
        self._live.add(seq, now)

    def search(self, beams: Beams, now: float) -> None:
        """Queue a beam search: its first sequence, which the other beams continue. Raises as `add` does."""
        self.add(beams.members[0], now)
        self._searches.add(beams)

    def finish(
        self, seq_id: int, reason: FinishReason = FinishReason.ABORT, error: Exception | None = None
    ) -> list[Event]:
        """End a sequence from outside. Ids that are unknown or have ended are ignored.

        A sequence in the executing step ends with the step, whose tokens it does not get; its event comes from there.
        """
        seq = self._live.by_id.get(seq_id)
        if seq is None:
            return []
        if seq.in_flight:
            self._endings.setdefault(seq_id, (reason, error))
            return []
        return [self._end(seq, reason, error), *self._end_beams()]

    def expire(self, now: float) -> list[Event]:
        """End the sequences that passed their deadline, or their first-token deadline without a token."""
        events: list[Event] = []
        for seq in self._live.deadlines.take_expired(now):
            events += self.finish(seq.id, FinishReason.DEADLINE)
        return events

    def offer(self, seq_id: int, draft: SequenceOf[int]) -> None:
        """Propose the next tokens of a sequence of `decoding()`; ignored for any other.

        The draft is cut to the blocks that remain when every other running sequence got one more, and earlier drafts
        got theirs, and to what a constraint allows.
        """
        seq = self._live.by_id.get(seq_id)
        if seq is not None and seq.takes_draft:
            if seq.constraint is not None:
                draft = seq.constraint.trim(draft)
            size, num_held = self._cache.block_size, len(seq.blocks)
            num_spare = max(0, self._cache.num_free_blocks - (self.num_running - 1) - self._num_draft_blocks)
            # The step adds one token of its own after the accepted ones.
            max_draft = min((num_held + num_spare) * size, seq.max_len - 1) - seq.length
            seq.draft = tuple(draft[: max(0, max_draft)])
            self._num_draft_blocks += max(0, -(-(seq.length + len(seq.draft)) // size) - num_held - 1)

    # Steps.

    def plan(self, now: float) -> StepPlan:
        """Decide the next step; without rows there is nothing to run and nothing to commit."""
        assert self._executing is None, "the last plan was neither committed nor failed"
        live, cache, limits = self._live, self._cache, self.limits.resolve()
        self.step_limits = limits
        self._num_draft_blocks = 0
        live.refresh(now)
        planner = StepPlanner(live, cache, self._packing, self._searches, self._events, limits, self._max_logit_rows)
        planner.plan()
        self._started += planner.started
        plan = StepPlan(tuple(planner.rows), *cache.take_moves(), planner.is_constrained)
        self._executing = plan if plan.rows else None
        return plan

    def take_started(self) -> list[Sequence]:
        """The sequences that left the queue for the first time since the last call."""
        started, self._started = self._started, []
        return started

    def commit(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Take in what a step produced: at most one event per sequence, and exactly one terminal event in its life."""
        assert plan is self._executing or not plan.rows
        self._executing = None
        version = result.weight_version
        settled: list[Event | None] = []
        reports: list[Report] = []
        for row, out in zip(plan.rows, result.rows, strict=True):
            settled.append(self._settle(row, out, version, reports))
            if row.siblings:
                siblings = zip(row.siblings, out.siblings, strict=True)
                settled += [self._settle(sibling, sample, version, reports) for sibling, sample in siblings]
        events = [event for event in settled if event is not None]
        if reports:
            search_events, failures = self._searches.advance(reports, version)
            events += search_events
            self._beam_endings += failures
        self._cache.commit(plan, result.timings_s)
        return events + self._end_beams() if self._beam_endings else events

    def fail(self, plan: StepPlan, error: Exception) -> list[Event]:
        """The forward pass failed: end every sequence of the plan, and keep nothing that it might have written.

        A score can be started without a row, in blocks that this step was to fill or copy. So whatever else runs is
        computed again, as far as the cache does not hold it.
        """
        assert plan is self._executing or not plan.rows
        self._executing = None
        self._cache.rollback()
        events = []
        for row in plan.rows:
            seq = self._live.by_id[row.seq_id]
            seq.in_flight = 0
            events.append(self._end(seq, *self._endings.pop(seq.id, (FinishReason.ERROR, error))))
        for seq in list(self._live.running.sequences):
            self._live.preempt(seq)
        return events + self._end_beams()

    def restart(self, plan: StepPlan, weight_version: int | None = None) -> list[Event]:
        """The model was changed: the step does not count, and every sequence's K/V are computed anew."""
        assert plan is self._executing
        self._executing = None
        self._cache.rollback()
        sequences = [self._live.by_id[row.seq_id] for row in plan.rows]
        for seq in sequences:
            seq.in_flight = 0
        self.recompute(weight_version)
        endings = [(seq, *self._endings.pop(seq.id)) for seq in sequences if seq.id in self._endings]
        return [self._end(*ending) for ending in endings] + self._end_beams()

    def recompute(self, weight_version: int | None = None) -> None:
        """The weights were changed between two steps: no K/V are reused, and every sequence's are computed anew."""
        assert self._executing is None
        self._cache.reset(weight_version)
        self._searches.forget_reports()
        self._forget_scores()
        for seq in list(self._live.running.sequences):
            self._live.preempt(seq)

    def keep_stale(self, weight_version: int) -> list[int]:
        """The weights were changed between two steps, and running sequences go on with their K/V; returns their ids.

        Nobody else finds these K/V, nor what is computed after them. Sequences whose scores are not complete are
        computed anew, because a score belongs to one version of the weights.
        """
        assert self._executing is None
        self._cache.reset(weight_version)
        self._forget_scores()
        for seq in list(self._live.running.sequences):
            if seq.scored and not seq.num_generated:
                self._live.preempt(seq)
        return [seq.id for seq in self._live.running.sequences]

    def _forget_scores(self) -> None:
        self._events.forget_scores(seq.id for seq in self._live.by_id.values() if not seq.num_generated)

    # Updates.

    def hold(self, admitted: Iterable[int]) -> None:
        """Start no sequences but these until `release_held`."""
        self._live.hold(admitted)

    def release_held(self) -> None:
        """Queue the sequences that were held."""
        self._live.release_held()

    @property
    def is_drained(self) -> bool:
        """Whether every sequence that `hold` admitted has ended."""
        return not self._live.is_any_admitted()

    def _settle(self, row: Row, out: RowResult, weight_version: int, reports: list[Report]) -> Event | None:
        """Take in one row: accept its tokens, or hand the candidates of a beam on as one of `reports`."""
        seq = self._live.by_id.get(row.seq_id)
        if seq is None:
            return None  # a sibling, which holds no blocks, ended during the step
        seq.in_flight = 0
        if seq.id in self._endings:
            return self._end(seq, *self._endings.pop(seq.id))
        if out.error is not None:
            return self._end(seq, FinishReason.ERROR, out.error)
        seq.draft = ()
        if not row.samples or out.candidates:
            seq.computed = row.end
            return self._settle_prompt(seq, row, out, weight_version, reports)
        tokens, num_drafts = out.tokens, len(out.tokens) - 1
        assert 0 <= num_drafts <= len(row.draft)
        count, reason, stop_token, error = accept(seq, tokens)
        if seq.constraint is not None:
            count, reason, stop_token, error = constrain(seq.constraint, tokens[:count], reason, stop_token)
        if error is not None:
            return self._end(seq, FinishReason.ERROR, error)
        if seq.status is Status.RUNNING:  # a sibling that samples with another sequence holds no blocks yet
            seq.computed = len(seq.tokens)
        if len(seq.tokens) == seq.prompt_len:
            self._live.enqueue_siblings(seq)
        seq.tokens.extend(tokens[:count])
        if num_drafts:  # all but the last token were drafts, whose K/V the step has written
            seq.computed += min(count, num_drafts)
            self._cache.seal(seq, seq.computed)
        if reason is not None:
            self._live.finish(seq, reason)
        return self._events.of_row(row, out, count, reason, stop_token, weight_version)

    def _settle_prompt(
        self, seq: Sequence, row: Row, out: RowResult, weight_version: int, reports: list[Report]
    ) -> Event | None:
        """Take in a row without a token: a part of a prompt, all of one that is pooled, or a beam's candidates."""
        if out.candidates:
            reports.append((seq.id, out.candidates))
        reason = FinishReason.STOP if seq.max_len == row.end == seq.prompt_len else None  # it was to be pooled
        if reason is not None:
            self._live.finish(seq, reason)
        return self._events.of_row(row, out, 0, reason, None, weight_version)

    def _end(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> Event:
        beams = self._searches.remove(seq)
        self._beam_endings += [(beam, reason, error) for beam in beams if beam is not seq]
        self._live.finish(seq, reason, error)
        return self._events.of_end(seq, reason, error)

    def _end_beams(self) -> list[Event]:
        """End the beams whose search has ended; those in the executing step end with it."""
        events: list[Event] = []
        while self._beam_endings:
            seq, reason, error = self._beam_endings.pop()
            events += self.finish(seq.id, reason, error)
        return events

    # Questions between steps. `Forecast` asks on callers' threads, which may see a sequence a step too early or late.

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._live.by_id)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that hold no blocks: in the queue, or withheld for others of their request."""
        return len(self._live.by_id) - len(self._live.running.sequences)

    @property
    def num_running(self) -> int:
        """Number of sequences that hold blocks."""
        return len(self._live.running.sequences)

    @property
    def num_shortages(self) -> int:
        """How often a running sequence was preempted because blocks ran out."""
        return self._live.num_shortages

    @property
    def used_fractions(self) -> list[float]:
        """Which fraction of their allowed tokens the latest sequences generated that ended by themselves."""
        return list(self._live.used_fractions)

    @property
    def next_deadline(self) -> float:
        """The earliest time at which `expire` may have something to do; infinity for never."""
        return self._live.deadlines.next_time

    def get(self, seq_id: int) -> Sequence | None:
        """The sequence with this id, unless it ended."""
        return self._live.by_id.get(seq_id)

    def sequences(self) -> list[Sequence]:
        """Every sequence that has not ended, in order of arrival here. Any thread may ask."""
        return list(self._live.by_id.values())

    def decoding(self) -> list[Sequence]:
        """The sequences that a draft can be offered to, best first."""
        return [seq for seq in self._live.running.sequences if seq.takes_draft]

    def stats(self) -> dict[str, int]:
        """Counts: num_waiting and num_running now, and of events since the start; see `EngineStats`."""
        live = self._live
        finished = {f"num_finished_{reason.value}": live.num_finished[reason] for reason in FinishReason}
        current = {"num_waiting": self.num_waiting, "num_running": self.num_running}
        return {**current, "num_preemptions": live.num_preemptions, "num_displaced": live.num_displaced, **finished}


def accept(seq: Sequence, tokens: SequenceOf[int]) -> Accepted:
    """What the sequence's stop ids and length make of its sampled tokens."""
    stop_ids, room = seq.stop_ids, seq.max_len - len(seq.tokens)
    for count, token in enumerate(tokens, 1):
        # The sampler suppresses stop ids before min_tokens already; a scripted model or a draft may not.
        if token in stop_ids and seq.num_generated + count > seq.params.min_tokens:
            return count, FinishReason.STOP, token, None
        if count >= room:
            return count, FinishReason.LENGTH, None, None
    return len(tokens), None, None, None

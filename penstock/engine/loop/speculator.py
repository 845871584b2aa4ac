"""`Speculator`: obtains draft tokens before a step is planned, and records their acceptance after the commit.

Owns the engine's drafter and its controller. Never changes the output; a drafter that fails is disabled. Runs on the
engine's loop, called by `EngineCore`; a draft model runs on the model's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from penstock.api.log import Logger
from penstock.config import EngineConfig
from penstock.engine.loop.worker import Job
from penstock.errors import text_of
from penstock.optimizers.speculation.controller import SpeculationController
from penstock.optimizers.speculation.drafter import Draft, Drafter, DraftRequest
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence
from penstock.step import StepPlan, StepResult

# Runs a function on the model's thread.
Run = Callable[..., Job[list[Draft]]]
_PRUNE_AT = 8  # remembered sequences beyond those that run
# With "auto", nothing is drafted while more sequences run than this: a step of more rows has no time to spare.
AUTO_MAX_ROWS = 4


class Speculator:
    """Drafts for the sequences of one scheduler. `clock` returns seconds.

    With "auto" it drafts from text only, for few rows, and where no output can depend on whether there was a draft:
    the model has to be batch invariant, and logits processors, which the caller may have written for one call per
    token, see no drafts.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        drafter: Drafter,
        run: Run,
        clock: Callable[[], float],
        log: Logger,
        *,
        is_batch_invariant: bool,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._drafter = drafter
        self._run = run
        self._clock = clock
        self._log = log
        self._allows_auto = is_batch_invariant and not drafter.runs_model
        self._controller = SpeculationController(drafter.runs_model)
        self._is_measured = False  # the step that is planned next, or runs
        self._overhead_s = 0.0  # what speculation itself took since the last step
        self._has_failed = False
        self._has_state = False  # of any sequence

    async def draft(self, on_begun: Callable[[], None]) -> None:
        """Offer drafts for the next step to the scheduler. Calls `on_begun` once a draft model has begun."""
        self._is_measured = self._is_on and self._allows_step(num_rows := self._scheduler.num_running)
        if not self._is_measured:
            return
        begin = self._clock()
        max_length = self._scheduler.limits.resolve().draft_length
        seqs = self._candidates() if max_length else []
        self._offer_forced(seqs, max_length)
        requests = self._controller.requests(seqs, num_rows, max_length)
        depth = await self._offer_drafts(requests, num_rows, on_begun) if requests else 0
        self._overhead_s += self._clock() - begin
        if depth:
            self._controller.record_drafting(num_rows, depth, self._overhead_s)

    def _offer_forced(self, seqs: Iterable[Sequence], max_length: int) -> None:
        """Offer what a grammar leaves no choice about, before the drafter is asked for the others."""
        for seq in seqs:
            if seq.constraint is not None:
                limit = seq.params.speculation_length
                if forced := seq.constraint.forced(max_length if limit is None else min(max_length, limit)):
                    self._scheduler.offer(seq.id, forced)

    def record(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """Record a committed step, which took `seconds` since the previous one."""
        if not self._is_measured:
            if self._has_state and not self._is_on:
                self._forget_all_but(())
                self._has_state = False
            return
        begin = self._clock()
        self._has_state = True
        self._controller.record_step(plan, result, seconds - self._overhead_s)
        if self._controller.num_sequences > self._scheduler.num_running + _PRUNE_AT:
            self.forget_ended()
        self._overhead_s = self._clock() - begin

    def forget_ended(self) -> None:
        """Drop the state of sequences that have ended."""
        self._forget_all_but(seq.id for seq in self._scheduler.sequences())

    def forget_all(self) -> None:
        """Drop the state of all sequences, for instance because a draft model loses its K/V."""
        self._forget_all_but(())

    def _forget_all_but(self, live: Iterable[int]) -> None:
        for seq_id in self._controller.forget_all_but(live):
            self._drafter.forget(seq_id)

    @property
    def _is_on(self) -> bool:
        setting = self._config.enable_speculative_decoding
        return not self._has_failed and (self._allows_auto if setting == "auto" else setting)

    def _allows_step(self, num_rows: int) -> bool:
        if num_rows > AUTO_MAX_ROWS and self._config.enable_speculative_decoding == "auto":
            return False
        return self._controller.allows_step(num_rows)

    def _candidates(self) -> list[Sequence]:
        seqs = self._scheduler.decoding()
        if self._config.enable_speculative_decoding == "auto":
            return [seq for seq in seqs if not seq.params.logits_processors]
        return seqs

    async def _offer_drafts(self, requests: list[DraftRequest], num_rows: int, on_begun: Callable[[], None]) -> int:
        """Returns how many tokens were drafted one after the other; 0 if the drafter failed."""
        job = await self._start_drafting(requests) if self._drafter.runs_model else None
        if job is not None:
            on_begun()
        try:
            drafts = self._drafter.propose(requests) if job is None else await job.done
            chosen = self._controller.choose(requests, drafts, num_rows)
        except Exception as error:
            self._give_up(error)
            return 0
        for seq_id, tokens in chosen:
            self._scheduler.offer(seq_id, tokens)
        return max(1, *(len(draft.tokens) for draft in drafts)) if self._drafter.runs_model else 1

    async def _start_drafting(self, requests: list[DraftRequest]) -> Job[list[Draft]]:
        job = self._run(self._drafter.propose, requests)
        await job.begun
        return job

    def _give_up(self, error: Exception) -> None:
        self._has_failed = True
        self._log.error(
            "the drafter failed; continuing without speculation", drafter=self._drafter.name, error=text_of(error)
        )

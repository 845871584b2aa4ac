"""`EngineCore`: everything on the engine's event loop: requests in, steps, deltas out.

Only its thread accesses scheduler and cache, so nothing here needs a lock. A step is plan, execute, commit; while the
model runs, arrivals and aborts are processed and the previous step's events are published. Run by `Host`; tests run the
same coroutine on their own loop, with a scripted model and a virtual clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from penstock.api.log import Logger
from penstock.api.waiting import Wakeups, call_on_loop
from penstock.constraints.masks import Masks
from penstock.engine.loop.adapters import AdapterOrders
from penstock.engine.loop.deadlines import DeadlineTimers
from penstock.engine.loop.gate import Gate, ModelJobs
from penstock.engine.loop.housekeeping import Housekeeper
from penstock.engine.loop.speculator import Speculator
from penstock.engine.loop.worker import Job
from penstock.engine.observe.metrics import Metrics
from penstock.engine.requests.endings import closing_error
from penstock.engine.requests.forking import Fork
from penstock.engine.requests.input_processor import Encoded, InputProcessor
from penstock.engine.requests.output_processor import OutputProcessor
from penstock.engine.requests.request import Request
from penstock.errors import (
    DeadlineExceeded,
    EngineClosed,
    ExecutionError,
    PenstockError,
    RequestAborted,
    RequestError,
    described,
    text_of,
)
from penstock.models.protocol import ModelChanged
from penstock.scheduling.admission import Admission, QueuePlace
from penstock.scheduling.scheduler import Scheduler
from penstock.scheduling.searches import Beams
from penstock.sequence import FinishReason
from penstock.step import Event, StepPlan, StepRecord, StepResult, record_of

# How long an idle engine waits for the next arrival of a burst before it starts a step, in seconds.
BURST_PAUSE_S = 0.001
RETRY_S = 0.05  # maximum wait, in seconds, before planning again after a step that could run nothing


class Execute(Protocol):
    """Starts a step on the model's thread; `masks` are given where any row samples under a constraint."""

    def __call__(self, plan: StepPlan, masks: Masks | None = None, /) -> Job[StepResult]:
        """The step's two futures."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreParts:
    """The collaborators of an `EngineCore`. `observe` is called after every step."""

    jobs: ModelJobs
    scheduler: Scheduler
    admission: Admission
    inputs: InputProcessor
    housekeeper: Housekeeper
    metrics: Metrics
    log: Logger
    observe: Callable[[StepRecord], None]
    speculator: Speculator | None = None


class EngineCore:
    """Serves requests with one model. Every method must be called on the loop that runs `run()`.

    `execute` starts a step on the model's thread. Tests replace `clock` and `sleep`.
    """

    def __init__(
        self,
        parts: CoreParts,
        execute: Execute,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.scheduler = parts.scheduler
        self.housekeeper = parts.housekeeper
        self._admission, self._inputs, self._log = parts.admission, parts.inputs, parts.log
        self._runner, self._observe_step = parts.jobs.runner, parts.observe
        self._speculator = parts.speculator
        self._execute = execute
        self._clock = clock
        self._sleep = sleep
        self._outputs = OutputProcessor(
            *(parts.scheduler, parts.admission, clock, parts.metrics, parts.log),
            forget=parts.jobs.runner.forget,
            on_end=self._forget,
        )
        self._wake = asyncio.Event()
        self.gate = Gate(parts.jobs, parts.scheduler, self._outputs, parts.speculator, self.abort_all, self._wake.set)
        self.adapters = AdapterOrders(parts.jobs, parts.inputs.adapters, self._outputs, self.gate)
        self._encoding: dict[str, Future[Encoded]] = {}
        self._timers = DeadlineTimers(clock, lambda request: self.abort(request.id, FinishReason.DEADLINE))
        self._num_arrivals, self._stopping = 0, False
        self._busy_since: float | None = None
        self._seq_ids = itertools.count()

    # Incoming requests.

    def submit(
        self, requests: Iterable[Request], displaced: Iterable[QueuePlace] = (), fork: Fork | None = None
    ) -> None:
        """Accept requests; with `fork`, as branches of its origin. Prompts may be encoded off this loop.

        Requests whose `displaced` places were taken by these end first, unless they have started, so that the queue
        never exceeds its limit.
        """
        for place in displaced:
            displaced_request = self._outputs.requests.get(place.request_id)
            if displaced_request is not None and displaced_request.place is place and displaced_request.started is None:
                self.abort(displaced_request.id, FinishReason.ERROR, self._admission.displaced())
        for request in requests:
            self._submit(request, fork)

    def _submit(self, request: Request, fork: Fork | None) -> None:
        fault: BaseException | None = None
        if fork is not None:
            try:
                request = fork.branch(request, self._outputs.requests.get(fork.origin_id), self._inputs)
            except BaseException as error:
                fault = error
        if not self._outputs.register(request):
            return
        self._num_arrivals += 1
        try:
            if fault is not None:
                raise fault
            if self.gate.fault is not None:
                raise EngineClosed(self.gate.fault)
            if request.place.is_lost:
                raise self._admission.displaced()
            if min(request.deadline, request.ttft_deadline) < math.inf:
                self._timers.set(request)
            encoded = self._inputs.encode(request)
            if isinstance(encoded, Future):
                self._encoding[request.id] = encoded
                loop = asyncio.get_running_loop()
                encoded.add_done_callback(lambda future: call_on_loop(loop, self._on_encoded, request, future))
            else:
                self._admit(request, encoded)
        except BaseException as error:
            self._reject(request, error)

    def _on_encoded(self, request: Request, encoded: Future[Encoded]) -> None:
        if request.channel.ended:
            return
        del self._encoding[request.id]
        try:
            self._admit(request, encoded.result())
        except BaseException as error:  # a panic in the tokenizer library is not an `Exception`
            self._reject(request, error)

    def _admit(self, request: Request, encoded: Encoded) -> None:
        self._wake.set()
        now = self._clock()
        self._inputs.admit(request, encoded, self._seq_ids, now)
        if request.search is not None:
            self.scheduler.search(Beams(request.search, request.sequences), now)
        else:
            for sequence in request.sequences:
                self.scheduler.add(sequence, now)
        self._outputs.attach(request)
        if waiters := request.channel.admit():
            wakeups = Wakeups()
            wakeups.add(waiters)
            wakeups.send()

    def _reject(self, request: Request, error: BaseException) -> None:
        if not isinstance(error, PenstockError):
            error = RequestError(f"the prompt could not be encoded: {described(error)}")
        reason = FinishReason.DEADLINE if isinstance(error, DeadlineExceeded) else FinishReason.ERROR
        self.abort(request.id, reason, error)

    def refuse(self, request: Request, error: BaseException) -> None:
        """End a request that could not be accepted with this error, unless it has ended."""
        if not request.channel.ended and (request.id in self._outputs.requests or self._outputs.register(request)):
            self._reject(request, error)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT, error: Exception | None = None) -> None:
        """End a request from outside; unknown and ended ids are ignored."""
        request = self._outputs.requests.get(request_id)
        if request is None:
            return
        self._log.debug("request aborted", request_id=request_id, reason=reason.value)
        self._outputs.end(request, reason, error)
        self._wake.set()

    def close_after(self, seconds: float, request_id: str) -> None:
        """End a request after so many seconds, unless it has ended, because the engine is being stopped."""
        asyncio.get_running_loop().call_later(seconds, self.abort, request_id, FinishReason.ABORT, closing_error())

    def close_all(self) -> None:
        """End all requests because the engine is being stopped; the scheduler still works."""
        for request_id in list(self._outputs.requests):
            self.abort(request_id, FinishReason.ABORT, closing_error())

    def abort_all(self, make_error: Callable[[str], PenstockError]) -> None:
        """End all requests; `make_error` makes the error of each from its id."""
        for request_id in list(self._outputs.requests):
            error = make_error(request_id)
            reason = FinishReason.ABORT if isinstance(error, RequestAborted) else FinishReason.ERROR
            self.abort(request_id, reason, error)

    def stop(self) -> None:
        """Make `run()` return once no request is open; those of an engine that is paused or asleep end at once."""
        self._stopping = True
        if self.gate.is_at_rest:
            self.close_all()
        self._wake.set()

    def close(self, error: BaseException | None) -> None:
        """End every open request because the engine ends. Never calls the scheduler, which may have failed."""
        self._outputs.close(error)

    @property
    def num_requests(self) -> int:
        """The number of requests that have not ended."""
        return len(self._outputs.requests)

    def _forget(self, request_id: str) -> None:
        """Cancel the timer and the pending encoding of a request that ended."""
        self._timers.clear(request_id)
        if self.adapters.held:
            self.adapters.drop_unused()
        self._wake.set()
        if (encoded := self._encoding.pop(request_id, None)) is not None:
            encoded.cancel()

    # Steps.

    async def run(self) -> None:
        """Serve until `stop()`."""
        while not (self._stopping and not self._outputs.requests):
            if self.gate.is_closing and self.gate.steps_are_over:
                await self._wait_at_gate()
                continue
            if not self.scheduler.has_work:
                await self._idle()
                if self.gate.is_closing:
                    continue
            if not await self.step() and self.scheduler.has_work:
                # There is work, but nothing could run: wait for an event, or for RETRY_S.
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), RETRY_S)

    async def step(self) -> bool:
        """Plan, execute, commit; returns False when there was nothing to run."""
        if expired := self.scheduler.expire(self._clock()):
            self._outputs.add_events(expired)
        if self._speculator is not None:
            await self._speculator.draft(on_begun=self._outputs.publish)
        plan = self.scheduler.plan(self._clock())
        if started := self.scheduler.take_started():
            self._outputs.mark_started(started)
        if not plan.rows:
            self._outputs.publish()
            return False
        checks, begin = self._runner.spec.checks_candidates, self._clock()
        masks = Masks.of(plan, checks_candidates=checks) if plan.is_constrained else None
        job = self._execute(plan) if masks is None else self._execute(plan, masks)
        try:
            await job.begun  # publishing earlier would hold the interpreter lock, which the model needs to begin
            self._outputs.publish()
        finally:
            if masks is not None:
                masks.fill()
        try:
            result = await job.done
        except ModelChanged:
            self._restart(plan)
        except Exception as error:
            self._outputs.add_events(self._fail_step(plan, error))
        else:
            events = self.scheduler.commit(plan, result)
            self._outputs.add_events(events)
            self._observe(plan, begin, result, events)
        if not self.scheduler.has_work:
            self._outputs.publish()
        return True

    async def _idle(self) -> None:
        """Wait without using the CPU until a request arrives, then until its burst pauses."""
        self._busy_since = None
        if self._speculator is not None:
            self._speculator.forget_ended()
        await self.housekeeper.tidy()
        while not (self.scheduler.has_work or self.gate.is_closing or (self._stopping and not self._outputs.requests)):
            self._outputs.publish()
            self._wake.clear()
            await self._wake.wait()
            await self._await_burst()

    async def _wait_at_gate(self) -> None:
        """Run no step until the gate opens. Requests still arrive, and end, meanwhile."""
        self._busy_since, gate = None, self.gate
        while gate.is_closing and gate.steps_are_over and not (self._stopping and not self._outputs.requests):
            self._outputs.publish()
            gate.note_stopped()
            self._wake.clear()
            await self._wake.wait()

    async def _await_burst(self) -> None:
        limits = self.scheduler.limits.resolve()
        until = self._clock() + limits.batch_timeout_s
        while self._clock() < until and self.scheduler.num_waiting < limits.max_running:
            num_arrivals = self._num_arrivals
            await self._sleep(BURST_PAUSE_S)
            if self._num_arrivals == num_arrivals and not self._encoding:
                break

    def _restart(self, plan: StepPlan) -> None:
        self._busy_since = None
        self._log.info("the borrowed module was changed: recomputing all K/V", rows=len(plan.rows))
        self._outputs.add_events(self.scheduler.restart(plan, self._runner.weight_version))
        self._outputs.restart_prompts()

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[Event]:
        if not isinstance(error, PenstockError):
            error = ExecutionError(f"the step failed: {described(error)}")
        self._busy_since = None
        self._log.error("step failed", rows=len(plan.rows), tokens=plan.num_tokens, error=text_of(error))
        return self.scheduler.fail(plan, error)

    def _observe(self, plan: StepPlan, begin: float, result: StepResult, events: list[Event]) -> None:
        """Record a step. Its time includes host work since a step that ended just before; idle time is not counted."""
        now = self._clock()
        seconds = now - (begin if self._busy_since is None else self._busy_since)
        self._busy_since = now
        record = record_of(plan, result, events, seconds, self.scheduler.num_waiting)
        if self._speculator is not None:
            self._speculator.record(plan, result, seconds)
        self._observe_step(record)

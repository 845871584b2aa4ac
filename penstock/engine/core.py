"""`EngineCore`: everything that happens on the engine's own event loop: requests in, steps, deltas out.

The only thread that touches scheduler and cache, so nothing here needs a lock. A step is plan, execute, commit; while
the model runs, arrivals and aborts are taken in and the last step's events are published. Tests drive the same
coroutine on their own loop with a scripted model and a virtual clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from typing import Any

from penstock.config import EngineConfig
from penstock.engine.alarms import Alarms
from penstock.engine.channel import hop
from penstock.engine.desk import Desk
from penstock.engine.door import Door
from penstock.engine.forking import Fork
from penstock.engine.housekeeping import Housekeeper
from penstock.engine.log import Logger
from penstock.engine.metrics import Metrics
from penstock.engine.request import Request
from penstock.engine.speculator import Speculator
from penstock.engine.worker import Job
from penstock.errors import DeadlineExceeded, ExecutionError, PenstockError, RequestError, described, text_of
from penstock.models.protocol import ModelChanged, ModelRunner
from penstock.scheduling.admission import Place
from penstock.scheduling.scheduler import Scheduler
from penstock.scheduling.searches import Beams
from penstock.sequence import FinishReason
from penstock.step import Event, StepPlan, StepRecord, StepResult, record_of

# How long an idle engine listens for the next arrival of a burst before it starts, in seconds.
BURST_PAUSE_S = 0.001
Execute = Callable[[StepPlan], Job[StepResult]]

# How a request is taken over: `EngineCore.submit`, or `EngineCore.fork` with its fork.
Take = Callable[["EngineCore", Request], None]


class EngineCore:
    """Serves requests with one model. Every method belongs to the loop that runs `run()`."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        scheduler: Scheduler,
        door: Door,
        execute: Execute,
        clock: Callable[[], float],
        metrics: Metrics,
        log: Logger,
        housekeeper: Housekeeper,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        watchers: Iterable[Callable[[StepRecord], None]] = (),
        speculator: Speculator | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.housekeeper = housekeeper
        self._config = config
        self._door = door
        self._execute = execute
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._sleep = sleep
        self._watchers = tuple(watchers)
        self._speculator = speculator
        self._desk = Desk(scheduler, runner, door, clock, metrics, log, self._forget)
        self._encoding: dict[str, Future[Any]] = {}
        self._alarms = Alarms(clock, lambda request: self.abort(request.id, FinishReason.DEADLINE))
        self._arrivals = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._busy_since: float | None = None
        self._seq_ids = itertools.count()

    # Requests in.

    def take_over(self, requests: Iterable[Request], lost: Iterable[Place], take: Take) -> None:
        """Let requests in by `take`, once those have left whose places they have: never do more wait than may.

        Of the requests that `lost` their places, those that have started meanwhile go on.
        """
        for place in lost:
            loser = self._desk.requests.get(place.request_id)
            if loser is not None and loser.place is place and loser.started is None:
                self.abort(loser.id, FinishReason.ERROR, self._door.displaced())
        for request in requests:
            take(self, request)

    def submit(self, request: Request) -> None:
        """Take over a request; its prompt is encoded off this loop."""
        if not self._desk.open(request):
            return
        self._arrivals += 1
        try:
            if request.place.is_lost:
                raise self._door.displaced()
            self._alarms.set(request)
            self._encode(request)
        except BaseException as error:
            self._reject(request, error)

    def fork(self, fork: Fork, request: Request) -> None:
        """Take over a request that goes on from where another one is; as `submit`."""
        try:
            fork.prepare(request, self._desk.requests.get(fork.origin_id), self._door)
        except BaseException as error:
            if self._desk.open(request):
                self._reject(request, error)
        else:
            self.submit(request)

    def refuse(self, request: Request, error: BaseException) -> None:
        """Taking over a request failed: it ends with the error, unless it has ended."""
        if not request.channel.ended and (request.id in self._desk.requests or self._desk.open(request)):
            self._reject(request, error)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT, error: Exception | None = None) -> None:
        """End a request from outside; unknown and ended ids are ignored."""
        request = self._desk.requests.get(request_id)
        if request is None:
            return
        self._log.debug("request aborted", request_id=request_id, reason=reason.value)
        self._desk.end(request, reason, error)
        self._wake.set()

    def abort_after(self, seconds: float, request_id: str) -> None:
        """`abort` a request that has not ended by then."""
        asyncio.get_running_loop().call_later(seconds, self.abort, request_id)

    def abort_all(self, error: Exception | None = None) -> None:
        """End everything, with `error` where one is given."""
        for request_id in list(self._desk.requests):
            self.abort(request_id, FinishReason.ABORT if error is None else FinishReason.ERROR, error)

    def stop(self) -> None:
        """Let `run()` return once nothing is left to do."""
        self._stopping = True
        self._wake.set()

    def close(self, error: BaseException | None) -> None:
        """End whatever is left because the engine ends. Asks nothing of the scheduler, which may be what failed."""
        self._desk.close(error)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._desk.requests)

    def _encode(self, request: Request) -> None:
        encoded = self._encoding[request.id] = self._door.encode(request)
        if encoded.done():
            self._encoded(request, encoded)
            return
        loop = asyncio.get_running_loop()
        encoded.add_done_callback(lambda f: hop(loop, self._encoded, request, f))

    def _encoded(self, request: Request, encoded: Future[Any]) -> None:
        self._wake.set()
        if request.channel.ended:
            return
        del self._encoding[request.id]
        try:
            self._door.enroll(request, encoded.result(), self._seq_ids, self._clock())
            self._enqueue(request)
            self._desk.seat(request)
        except BaseException as error:  # a tokenizer's panic is no `Exception`
            self._reject(request, error)

    def _enqueue(self, request: Request) -> None:
        if request.search is not None:
            self.scheduler.search(Beams(request.search, request.sequences), self._clock())
            return
        for sequence in request.sequences:
            self.scheduler.add(sequence, self._clock())

    def _forget(self, request_id: str) -> None:
        """A request ended: its alarm and its encoding, if that still runs, are of no use any more."""
        self._alarms.clear(request_id)
        self._wake.set()
        if (encoded := self._encoding.pop(request_id, None)) is not None:
            encoded.cancel()

    def _reject(self, request: Request, error: BaseException) -> None:
        for sequence in request.sequences:
            self.scheduler.abort(sequence.id)
        request.sequences = []
        if not isinstance(error, PenstockError):
            error = RequestError(f"the prompt could not be encoded: {described(error)}")
        reason = FinishReason.DEADLINE if isinstance(error, DeadlineExceeded) else FinishReason.ERROR
        self.abort(request.id, reason, error)

    # Steps.

    async def run(self) -> None:
        """Serve until `stop()`."""
        while not (self._stopping and not self._desk.requests):
            if not self.scheduler.has_work:
                await self._rest()
            if not await self.step():
                await self._pause()

    async def step(self) -> bool:
        """Plan, execute, commit; False when there was nothing to run."""
        self._desk.add_news(self.scheduler.expire(self._clock()))
        if self._speculator is not None:
            await self._speculator.draft(meanwhile=self._desk.publish)
        plan = self.scheduler.plan(self._clock())
        self._desk.note_started()
        if not plan.rows:
            self._desk.publish()
            return False
        begin = self._clock()
        executing = self._execute(plan)
        await executing.begun  # publishing at once would hold the interpreter's lock, which the model needs to begin
        self._desk.publish()
        try:
            result = await executing.done
        except ModelChanged:
            self._restart(plan)
        except Exception as error:
            self._desk.add_news(self._failed(plan, error))
        else:
            events = self.scheduler.commit(plan, result)
            self._desk.add_news(events)
            self._account_step(plan, begin, result, events)
        if not self.scheduler.has_work:
            self._desk.publish()
        return True

    async def _rest(self) -> None:
        """Wait without using the CPU until something arrives, then for the burst to pause."""
        self._busy_since = None
        if self._speculator is not None:
            self._speculator.forget_ended()
        await self.housekeeper.tidy()
        while not self.scheduler.has_work and not (self._stopping and not self._desk.requests):
            self._desk.publish()
            self._wake.clear()
            await self._wake.wait()
            await self._coalesce()

    async def _coalesce(self) -> None:
        limits = self.scheduler.limits
        until = self._clock() + limits.batch_timeout_s
        while self._clock() < until and self.scheduler.num_waiting < limits.max_running:
            before = self._arrivals
            await self._sleep(BURST_PAUSE_S)
            if self._arrivals == before and not self._encoding:
                break

    async def _pause(self) -> None:
        """Nothing could run although work is there: wait for news, at most a moment."""
        if self.scheduler.has_work:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 0.05)

    def _restart(self, plan: StepPlan) -> None:
        self._busy_since = None
        self._log.info("the borrowed module was changed: all K/V are computed anew", rows=len(plan.rows))
        self._desk.add_news(self.scheduler.restart(plan))

    def _failed(self, plan: StepPlan, error: Exception) -> list[Event]:
        if not isinstance(error, PenstockError):
            error = ExecutionError(f"the step failed: {described(error)}")
        self._busy_since = None
        self._log.error("step failed", rows=len(plan.rows), tokens=plan.num_tokens, error=text_of(error))
        return self.scheduler.fail(plan, error)

    def _account_step(self, plan: StepPlan, begin: float, result: StepResult, events: list[Event]) -> None:
        """Back to back, a step's time includes the host work since the last one ended; idle time belongs to none."""
        now = self._clock()
        seconds = now - (begin if self._busy_since is None else self._busy_since)
        self._busy_since = now
        record = record_of(plan, result, events, seconds, self.scheduler.num_waiting)
        if self._speculator is not None:
            self._speculator.record(plan, result, seconds)
        drafted = sum(event.num_drafted_tokens for event in events)
        self._metrics.step(record, drafted, sum(event.num_accepted_tokens for event in events))
        for watch in self._watchers:
            watch(record)
        if self._config.profile_performance:
            self._log.debug("step", rows=len(plan.rows), tokens=plan.num_tokens, seconds=seconds, **result.timings_s)

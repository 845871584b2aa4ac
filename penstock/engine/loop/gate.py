"""`Gate`: stops the steps of an engine and lets them go on, for weight updates, pauses and sleep.

Owns the engine's state: which order may follow which, and whether steps may run. Orders are coroutines on the engine's
loop. `EngineCore.run` asks between two steps, so an order that has stopped the steps has scheduler, cache and model to
itself until it lets them go on. Never waits for a step that has begun, and never reads a weight. Called by
`EngineCore`, and for the methods of `Updates`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar, TypeVarTuple

from penstock.api.weights import SleepLevel, UpdateMode, WeightSource
from penstock.engine.loop.speculator import Speculator
from penstock.engine.loop.worker import Job
from penstock.engine.requests.output_processor import OutputProcessor
from penstock.errors import (
    EngineClosed,
    EngineStateError,
    PenstockError,
    RequestAborted,
    WeightsError,
    described,
    text_of,
)
from penstock.models.protocol import ModelRunner
from penstock.scheduling.scheduler import Scheduler

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class EngineState(StrEnum):
    """What the engine is doing. CHANGING: an order is being carried out. MIXED: an update failed half way."""

    RUNNING = "running"
    CHANGING = "changing"
    UPDATING = "updating"
    PAUSED = "paused"
    ASLEEP = "asleep"
    MIXED = "mixed"


# Order -> the states that allow it.
ALLOWED = {
    "update": (EngineState.RUNNING, EngineState.PAUSED, EngineState.ASLEEP),
    "pause": (EngineState.RUNNING,),
    "resume": (EngineState.PAUSED,),
    "sleep": (EngineState.RUNNING, EngineState.PAUSED),
    "wake": (EngineState.ASLEEP,),
}
REMEDIES = {
    EngineState.RUNNING: "pause() or sleep() comes first",
    EngineState.CHANGING: "wait until the order before this one has been carried out",
    EngineState.UPDATING: "wait until the update before this one has ended",
    EngineState.PAUSED: "resume() comes first",
    EngineState.ASLEEP: "wake() comes first",
    EngineState.MIXED: "close it and make a new one, because old and new weights are mixed",
}


class Run(Protocol):
    """Queues a job on the model's thread."""

    def __call__(self, function: Callable[[*Ts], T], /, *arguments: *Ts) -> Job[T]:
        """The job's two futures."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelJobs:
    """What an order has the model's thread do: `run` queues a job there, and `unload` and `reload` are jobs."""

    runner: ModelRunner
    run: Run
    unload: Callable[[SleepLevel], None] = lambda level: None
    reload: Callable[[SleepLevel], None] = lambda level: None


class Gate:
    """One order at a time: any other raises `EngineStateError`.

    `is_closing` is true from the beginning of an order that stops the steps until they go on. `abort_all(make_error)`
    ends all requests, with an error made from the id of each; `wake()` wakes `EngineCore.run`.
    """

    def __init__(
        self,
        jobs: ModelJobs,
        scheduler: Scheduler,
        outputs: OutputProcessor,
        speculator: Speculator | None,
        abort_all: Callable[[Callable[[str], PenstockError]], None],
        wake: Callable[[], None],
    ) -> None:
        self.state = EngineState.RUNNING
        self.is_closing = False
        self.fault: str | None = None  # why all requests are refused, once weights are mixed
        self.num_writes = 0  # rises when an update may begin to write, and when it has ended: while one does, it is odd
        self._ready: WeightSource = None  # what `begin_update` has read
        self._jobs = jobs
        self._scheduler = scheduler
        self._outputs = outputs
        self._speculator = speculator
        self._abort_all = abort_all
        self._wake = wake
        self._resting = EngineState.RUNNING  # the state to which an update returns
        self._awake = EngineState.RUNNING  # the state to which `wake` returns
        self._level: SleepLevel = "all"
        self._stopped: asyncio.Future[None] | None = None  # completed by `EngineCore.run`
        self._is_draining = False
        self._writing: asyncio.Task[None] | None = None  # the order that changes weights or memory, and has to end
        self._begun: Future[None] | None = None  # the order that began the present or the latest update
        self._tasks: dict[Future[None], asyncio.Task[None]] = {}

    # Called by `EngineCore`.

    @property
    def steps_are_over(self) -> bool:
        """Whether no step has to run before the order that closes the gate."""
        return not self._is_draining or self._scheduler.is_drained

    def note_stopped(self) -> None:
        """No step runs, and none will before the gate opens."""
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)

    @property
    def is_at_rest(self) -> bool:
        """Whether requests wait for an order of which nobody knows when it comes."""
        return self.state in (EngineState.PAUSED, EngineState.ASLEEP, EngineState.MIXED)

    # Orders from other threads.

    def start(self, order: Coroutine[object, object, None], outcome: Future[None]) -> None:
        """Carry out an order; `outcome` is completed when it has ended, also because the engine ends first."""
        task = asyncio.get_running_loop().create_task(order)
        self._tasks[outcome] = task
        task.add_done_callback(lambda task: self._complete(task, outcome))

    def cancel(self, outcome: Future[None]) -> None:
        """Give up an order whose caller has left, unless it writes or releases something already.

        Where the caller left just when its update had begun, that ends.
        """
        task = self._tasks.get(outcome)
        if task is not None and task.done():  # `_complete` is about to be called
            asyncio.get_running_loop().call_soon(self.cancel, outcome)
        elif task is not None:
            if task is not self._writing:
                task.cancel()
        elif self.state is EngineState.UPDATING and outcome is self._begun:
            self._rest()

    def _complete(self, task: asyncio.Task[None], outcome: Future[None]) -> None:
        del self._tasks[outcome]
        if task.cancelled():
            outcome.set_exception(EngineClosed("the engine was stopped before the order was carried out"))
        elif (error := task.exception()) is not None:
            outcome.set_exception(error)
        else:
            if self.state is EngineState.UPDATING:
                self._begun = outcome
            outcome.set_result(None)

    # Orders.

    async def begin_update(self, mode: UpdateMode, source: WeightSource = None) -> None:
        """Check the weights of a source (None: of the owner, who writes them now), and stop the steps.

        `end_update` or `abandon_update` comes next. Raises `WeightsError`.
        """
        self._ready = await self._check_and_stop(mode, source)
        self.state = EngineState.UPDATING

    async def end_update(self, stale_kv: bool, source: WeightSource = None) -> None:
        """Write the weights of a source (None: that of `begin_update`), and let the steps go on."""
        ready, self._ready = self._ready, None
        await self._update(ready if source is None else source, stale_kv)

    async def abandon_update(self) -> None:
        """Let the steps go on after `begin_update` as if nothing had been asked."""
        self._ready = None
        if self.state is EngineState.UPDATING:
            self._rest()

    async def update(self, source: WeightSource, mode: UpdateMode, stale_kv: bool) -> None:
        """Check the weights of a source, stop the steps, write, and let the steps go on. Raises `WeightsError`."""
        await self._update(await self._check_and_stop(mode, source), stale_kv)

    async def read(self, source: WeightSource, ready: list[WeightSource]) -> None:
        """Add to `ready` what the weights of a source are once they are checked. Raises `WeightsError`."""
        ready.append(await self._jobs.run(self._jobs.runner.read_weights, source).done)

    async def pause(self, mode: UpdateMode) -> None:
        """Stop the steps until `resume`."""
        await self._enter("pause")
        await self._stop_steps(mode)
        self._rest(EngineState.PAUSED)

    async def resume(self) -> None:
        """Let the steps go on after `pause`."""
        self._require("resume")
        self._rest(EngineState.RUNNING)

    async def sleep(self, level: SleepLevel, mode: UpdateMode) -> None:
        """Stop the steps until `wake`, and release memory. Raises `WeightsError` where weights would be lost."""
        await self._enter("sleep", lambda: self._check_unload(level))
        await self._stop_steps(mode)
        self._awake, self._level = self._resting, level
        try:
            if level != "weights":
                self._recompute()
                if self._speculator is not None:
                    self._speculator.forget_all()
            await self._change(self._jobs.unload, level)
        except BaseException:
            self._rest()
            raise
        self._rest(EngineState.ASLEEP)

    async def wake(self) -> None:
        """Take the memory back, and return to the state before `sleep`.

        Raises `OutOfMemory`, `WeightsError`, and then stays asleep.
        """
        await self._enter("wake")
        try:
            await self._change(self._jobs.reload, self._level)
        except BaseException:
            self._rest(EngineState.ASLEEP)
            raise
        self._rest(self._awake)

    # Steps of an order.

    def _require(self, verb: str) -> None:
        if self.state not in ALLOWED[verb]:
            raise EngineStateError(f"{verb} is not possible: the engine is {self.state}; {REMEDIES[self.state]}")

    async def _enter(self, verb: str, prepare: Callable[[], Coroutine[object, object, object]] | None = None) -> None:
        """Begin an order; with `prepare`, while steps still run. Where that fails, nothing has changed."""
        self._require(verb)
        self._resting, self.state = self.state, EngineState.CHANGING
        if prepare is not None:
            try:
                await prepare()
            except BaseException:
                self.state = self._resting
                raise

    async def _check_unload(self, level: SleepLevel) -> None:
        await self._jobs.run(self._jobs.runner.check_unload, level).done

    async def _check_and_stop(self, mode: UpdateMode, source: WeightSource) -> WeightSource:
        """Begin an update, while steps still run and then without them; what the source is once it was read."""
        ready: list[WeightSource] = []
        await self._enter("update", lambda: self.read(source, ready))
        await self._stop_steps(mode)
        self.num_writes += 1
        return ready[0]

    async def _stop_steps(self, mode: UpdateMode) -> None:
        """Return once no step runs: after the running one, or with "wait" after the last of the started requests."""
        started = self._outputs.started_sequences()
        if self.is_closing and mode == "wait" and started:
            self.state = self._resting
            raise EngineStateError(
                f"started requests cannot end while the engine is {self.state}: use mode='keep' or 'abort', or "
                f"{REMEDIES[self.state]}"
            )
        if mode == "abort":
            self._abort_all(aborted)
        if self.is_closing:
            return
        if mode == "wait":
            self._scheduler.hold(started)
        self._is_draining = mode == "wait"
        self.is_closing = True
        self._stopped = asyncio.get_running_loop().create_future()
        self._wake()
        try:
            await self._stopped
        except BaseException:
            self._rest()
            raise
        finally:
            self._stopped = None

    async def _update(self, source: WeightSource, stale_kv: bool) -> None:
        self.state, runner = EngineState.CHANGING, self._jobs.runner
        try:
            await self._change(runner.update_weights, source)
        except Exception as error:
            if isinstance(error, WeightsError) and not error.is_mixed:
                self._rest()
                raise
            raise self._mixed(error) from error
        if stale_kv:
            self._outputs.mark_stale(self._scheduler.keep_stale(runner.weight_version))
            self._outputs.restart_prompts()
        else:
            self._recompute(runner.weight_version)
        self._rest()

    async def _change(self, function: Callable[[T], None], argument: T) -> None:
        """Run what cannot be given up on the model's thread."""
        self._writing = asyncio.current_task()
        try:
            await self._jobs.run(function, argument).done
        finally:
            self._writing = None

    def _recompute(self, weight_version: int | None = None) -> None:
        self._scheduler.recompute(weight_version)
        self._outputs.restart_prompts()

    def _mixed(self, error: Exception) -> WeightsError:
        """Refuse everything from here on; the error to report."""
        if not isinstance(error, WeightsError):
            text = f"refreshing the weights failed: {described(error)}; old and new ones are mixed: close the engine"
            error = WeightsError(text, is_mixed=True)
        self.state = EngineState.MIXED
        self.fault = fault = f"an update of the weights failed half way, close the engine: {text_of(error)}"
        self._abort_all(lambda request_id: EngineClosed(fault))
        return error

    def _rest(self, state: EngineState | None = None) -> None:
        """End an order in this state, or in the one before the order; in RUNNING, steps go on."""
        self.state = self._resting if state is None else state
        self.num_writes += self.num_writes % 2
        if self.state is EngineState.RUNNING:
            self.is_closing = self._is_draining = False
            self._scheduler.release_held()
            self._wake()


def aborted(request_id: str) -> RequestAborted:
    """The error of a request that an order has ended."""
    return RequestAborted(
        f"request {request_id} was ended by an update, pause or sleep with mode='abort': "
        "to go on, submit its prompt and output as a new request"
    )

"""The step loop, run on the test's own loop: a scripted model, a virtual clock, no threads, no waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from penstock.api.channel import Channel, RequestStatus
from penstock.api.log import make_logger
from penstock.api.prompt import read_prompt
from penstock.api.transcript import Transcript
from penstock.api.waiting import Wakeups
from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.engine.loop.core import CoreParts, EngineCore
from penstock.engine.loop.gate import ModelJobs
from penstock.engine.loop.housekeeping import Housekeeper
from penstock.engine.loop.worker import Job
from penstock.engine.observe.metrics import Metrics
from penstock.engine.requests import collector
from penstock.engine.requests.input_processor import InputProcessor
from penstock.engine.requests.request import Request
from penstock.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineOverloaded,
    ExecutionError,
    RequestAborted,
    RequestError,
    RequestTooLarge,
)
from penstock.models.protocol import ModelChanged
from penstock.models.scripted import Script, ScriptedModel
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import SamplingParams
from penstock.scheduling.admission import Admission, QueuePlace
from penstock.scheduling.scheduler import Scheduler
from penstock.step import Event, StepPlan, StepResult

PATIENCE_S = 60.0


class LetterTokenizer:
    """Token 0 is "a", token 1 is "b"; 30 cannot be decoded, 31 panics like the Rust library."""

    def __len__(self) -> int:
        return 32

    def convert_ids_to_tokens(self, ids: list[int], **options: Any) -> list[str]:
        return [chr(97 + i) for i in ids]

    def decode(self, ids: list[int], **options: Any) -> str:
        if 30 in ids:
            raise ValueError("no text for 30")
        if 31 in ids:
            raise Panic("index out of bounds")
        return "".join(self.convert_ids_to_tokens(ids))


class Panic(BaseException):
    """The exception type of a panic in a Rust tokenizer: not an `Exception`."""


class HeldPool:
    """A tokenizer pool whose results the test sets."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """A future that no worker completes."""
        self.futures.append(Future())
        return self.futures[-1]


class BrokenPool:
    """A closed tokenizer pool."""

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Raise."""
        raise EngineClosed("the tokenizer workers were stopped")


class TracedScheduler(Scheduler):
    """Records when it plans and commits."""

    trace: list[str]

    def plan(self, now: float) -> StepPlan:
        self.trace.append("plan")
        return super().plan(now)

    def commit(self, plan: StepPlan, result: StepResult) -> list[Event]:
        self.trace.append("commit")
        return super().commit(plan, result)


class TracedChannel(Channel):
    """Records writes, and the number of terminal events."""

    trace: list[str]

    def put(self, transcript: Transcript, wakeups: Wakeups) -> None:
        self.trace.append("publish")
        super().put(transcript, wakeups)

    def end(self, *args: Any) -> None:
        self.trace.append("end")
        super().end(*args)


class Rig:
    """An engine core and everything that it needs; `now` is its clock."""

    def __init__(
        self,
        script: Script = (5, 6, 7),
        pool: Any = None,
        tokenizer: Any = None,
        speculator: Any = None,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig(**{"batch_timeout_ms": 0, "block_size": 4, **settings})
        self.model = ScriptedModel(script, vocab_size=32, max_length=64)
        self.cache = CacheManager(32, 4)
        self.scheduler = TracedScheduler(self.config, self.cache)
        self.trace = self.scheduler.trace = []
        self.admission = Admission(self.config)
        self.metrics = Metrics()
        self.now = 0.0
        self.step_s = 0.01
        self.sleeps: list[float] = []
        self.plans: list[StepPlan] = []
        self.planned = asyncio.Event()
        self.while_sleeping: Callable[[], None] = lambda: None
        self.while_beginning: Callable[[], None] = lambda: None
        self.while_executing: Callable[[], None] = lambda: None
        tokenizer = tokenizer or LetterTokenizer()
        spec, log = self.model.spec, make_logger("CRITICAL")
        self.housekeeper = Housekeeper(self.config, self.model, self.cache, lambda: self.now, self.run_job)
        parts = CoreParts(
            jobs=ModelJobs(runner=self.model, run=self.run_job),
            scheduler=self.scheduler,
            admission=self.admission,
            inputs=InputProcessor(self.config, spec, spec.max_length, tokenizer, pool, self.admission),
            housekeeper=self.housekeeper,
            metrics=self.metrics,
            observe=self.metrics.step,
            log=log,
            speculator=speculator,
        )
        self.core = EngineCore(parts, self.execute, lambda: self.now, self.sleep)

    def run_job(self, function: Callable[..., Any], *arguments: Any) -> Job[Any]:
        """A job on an idle model thread."""
        self.trace.append("job")
        loop = asyncio.get_running_loop()
        job: Job[Any] = Job(loop.create_future(), loop.create_future())
        try:
            job.done.set_result(function(*arguments))
        except Exception as error:
            job.done.set_exception(error)
        return job

    def execute(self, plan: StepPlan) -> Job[StepResult]:
        """Begin at the next loop iteration, like a thread, and end at the one after."""
        self.trace.append("execute")
        self.plans.append(plan)
        self.planned.set()
        loop = asyncio.get_running_loop()
        job: Job[StepResult] = Job(loop.create_future(), loop.create_future())
        loop.call_soon(self.begin_step, plan, job)
        return job

    def begin_step(self, plan: StepPlan, job: Job[StepResult]) -> None:
        """The model's thread has started the step."""
        self.while_beginning()
        self.trace.append("begin")
        job.begun.set_result(None)
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self.finish_step, plan, job.done)

    def finish_step(self, plan: StepPlan, future: asyncio.Future[StepResult]) -> None:
        """The model has finished the step."""
        self.while_executing()
        self.trace.append("result")
        self.now += self.step_s
        try:
            future.set_result(self.model.execute(plan))
        except Exception as error:
            future.set_exception(error)

    async def sleep(self, seconds: float) -> None:
        """Advance the clock at once."""
        self.sleeps.append(seconds)
        self.now += seconds
        self.while_sleeping()
        await asyncio.sleep(0)

    def submit(self, prompt: Any = (1, 2, 3), *, name: str = "a", max_tokens: int = 2, **options: Any) -> Channel:
        """Submit a request as a caller's thread would; options are fields of `Request` and `SamplingParams`."""
        times = {key: options.pop(key) for key in ("deadline", "ttft_deadline") if key in options}
        channel = TracedChannel(name)
        channel.trace = self.trace
        place = QueuePlace(name, 3, options.pop("priority", 2))
        self.admission.reserve([place])
        params = SamplingParams(max_tokens=max_tokens, **options)
        given = {"id": name, "prompt": read_prompt(prompt), "params": params, "channel": channel, "arrival": self.now}
        self.core.submit([Request(**given, **times, place=place)])
        return channel

    async def steps(self, count: int) -> None:
        """Run some steps."""
        for _ in range(count):
            await self.core.step()

    async def finish(self) -> None:
        """Serve until all requests have ended."""
        self.core.stop()
        await asyncio.wait_for(self.core.run(), PATIENCE_S)

    def is_clean(self) -> bool:
        """Whether no state of any request is left."""
        free = self.cache.stats()["num_free_blocks"] == 32
        empty = not self.scheduler.has_work and self.core.num_requests == 0
        return free and empty and (self.admission.num_requests, self.admission.num_tokens) == (0, 0)


async def drain(channel: Channel) -> list[Delta]:
    """The deltas available now, without the error after them."""
    found: list[Delta] = []
    while True:
        try:
            delta = await asyncio.wait_for(channel.take(), PATIENCE_S)
        except Exception:
            return found
        if delta is None:
            return found
        found.append(delta)


def ending(channel: Channel) -> RequestOutput | Exception:
    """The error of a request that ended."""
    assert channel.ended
    try:
        return channel.outcome()
    except Exception as error:
        return error


def ids_of(channel: Channel) -> list[int]:
    """The tokens of a completed request."""
    return channel.outcome().outputs[0].token_ids


async def test_events_are_published_once_the_next_step_executes() -> None:
    rig = Rig()
    rig.submit(max_tokens=2)
    await rig.steps(2)
    first = ["plan", "execute", "begin", "result", "commit"]
    second = ["plan", "execute", "begin", "publish", "result", "commit"]
    assert rig.trace == [*first, *second, "publish", "end"]


async def test_last_event_is_published_at_once_when_no_step_follows() -> None:
    rig = Rig()
    channel = rig.submit(max_tokens=1)
    await rig.steps(1)
    assert channel.ended
    assert ids_of(channel) == [5]


async def test_step_without_work_runs_nothing() -> None:
    rig = Rig()
    assert not await rig.core.step()
    assert rig.plans == []


async def test_arrivals_during_a_step_join_the_next_one() -> None:
    rig = Rig()
    rig.submit(name="a", max_tokens=3)
    left = ["b"]
    rig.while_executing = lambda: left and rig.submit(name=left.pop())  # type: ignore[assignment]
    await rig.steps(2)
    assert [len(plan.rows) for plan in rig.plans] == [1, 2]


async def test_burst_is_coalesced_into_one_step() -> None:
    rig = Rig(batch_timeout_ms=50)
    left = ["b", "c"]
    rig.while_sleeping = lambda: left and rig.submit(name=left.pop(0))  # type: ignore[assignment]
    running = asyncio.create_task(rig.core.run())
    await asyncio.sleep(0)
    rig.submit(name="a")
    await rig.planned.wait()
    assert len(rig.plans[0].rows) == 3
    assert len(rig.sleeps) == 3  # two arrivals, then the pause that ends the burst
    rig.core.stop()
    await running
    assert rig.is_clean()


async def test_burst_that_never_pauses_is_cut_off_by_the_timeout() -> None:
    rig = Rig(batch_timeout_ms=20, max_batch_size=64)
    rig.while_sleeping = lambda: rig.submit(name=f"r{len(rig.sleeps)}", max_tokens=1)  # type: ignore[assignment]
    running = asyncio.create_task(rig.core.run())
    await asyncio.sleep(0)
    rig.submit(name="a")
    await rig.planned.wait()
    assert len(rig.sleeps) in (20, 21)  # of one millisecond each, within rounding
    rig.while_sleeping = lambda: None
    rig.core.stop()
    await running


async def test_an_engine_gives_memory_back_when_it_turns_idle_and_not_between_steps() -> None:
    rig, trimmed = Rig(), asyncio.Event()

    def trim_memory(*_: Any) -> int:
        trimmed.set()
        return 0

    rig.model.memory_usage = lambda: 0.9  # type: ignore[method-assign]
    rig.model.trim_memory = trim_memory  # type: ignore[method-assign]
    running = asyncio.create_task(rig.core.run())
    rig.submit(max_tokens=3)
    await asyncio.wait_for(trimmed.wait(), PATIENCE_S)
    rig.core.stop()
    await running
    assert rig.trace.count("job") == 1
    assert rig.trace.index("job") > max(i for i, word in enumerate(rig.trace) if word == "commit")


async def test_full_batch_ends_the_burst() -> None:
    rig = Rig(batch_timeout_ms=50, max_batch_size=2)
    left = ["b", "c", "d", "e"]
    rig.while_sleeping = lambda: left and rig.submit(name=left.pop(0))  # type: ignore[assignment]
    running = asyncio.create_task(rig.core.run())
    await asyncio.sleep(0)
    rig.submit(name="a")
    await rig.planned.wait()
    assert len(rig.sleeps) == 1
    rig.core.stop()
    await running


async def test_without_batch_timeout_the_first_request_starts_at_once() -> None:
    rig = Rig(batch_timeout_ms=0)
    running = asyncio.create_task(rig.core.run())
    await asyncio.sleep(0)
    rig.submit(name="a")
    await rig.planned.wait()
    assert rig.sleeps == []
    rig.core.stop()
    await running


async def test_stop_string_ends_a_sequence_that_is_in_flight() -> None:
    """The stop string is found when step 3 is published, while step 4 executes with the sequence."""
    rig = Rig(script=[0, 1, 2, 3, 4, 5, 6])  # a b c d e f g
    channel = rig.submit(max_tokens=7, stop="bc")
    await rig.steps(4)
    assert len(rig.plans) == 4
    deltas = await drain(channel)
    assert "".join(delta.text for delta in deltas) == "a"
    assert [t for delta in deltas for t in delta.token_ids] == [0, 1, 2]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop_reason == "bc"
    assert not await rig.core.step()
    assert rig.is_clean()
    assert rig.trace.count("end") == 1


async def test_sequence_that_a_stop_string_ended_counts_as_stopped() -> None:
    """It was counted as aborted, because the scheduler was told to abort it."""
    rig = Rig(script=[0, 1, 2, 3, 4, 5, 6])
    rig.submit(max_tokens=7, stop="bc")
    await rig.finish()
    stats = rig.scheduler.stats()
    assert (stats["num_finished_stop"], stats["num_finished_abort"]) == (1, 0)


async def test_failed_step_ends_its_batch_and_the_engine_serves_on() -> None:
    rig = Rig(max_batch_size=1)
    rig.model.fail_next(ValueError("boom"))
    first, second = rig.submit(name="a"), rig.submit(name="b")
    await rig.finish()
    error = ending(first)
    assert isinstance(error, ExecutionError)
    assert "boom" in str(error)
    assert ids_of(second) == [5, 6]
    assert rig.trace.count("end") == 2
    assert rig.is_clean()


async def test_step_during_which_the_model_changed_is_run_again() -> None:
    rig = Rig()
    channel = rig.submit()
    rig.model.fail_next(ModelChanged())
    await rig.finish()
    assert ids_of(channel) == [5, 6]
    assert rig.is_clean()


async def test_failed_step_keeps_its_own_error_type() -> None:
    rig = Rig()
    error = ExecutionError("CUDA fell off the bus")
    rig.model.fail_next(error)
    channel = rig.submit()
    await rig.finish()
    assert ending(channel) is error


@pytest.mark.parametrize("bad", [30, 31])
async def test_failing_detokenizer_fails_its_request_alone(bad: int) -> None:
    """A tokenizer that failed to decode failed again while the last delta was made, which ended the engine."""
    rig = Rig(script=lambda tokens, index: bad if tokens[0] == 9 else 1)
    first, second = rig.submit((9, 1), name="a", max_tokens=3), rig.submit((2, 2), name="b", max_tokens=3)
    await rig.finish()
    error = ending(first)
    assert isinstance(error, RequestError)
    assert "could not be turned into text" in str(error)
    assert first.status is RequestStatus.FAILED
    assert second.outcome().text == "bbb"
    assert rig.trace.count("end") == 2
    assert rig.is_clean()


async def test_request_with_a_broken_text_fails_even_if_it_is_aborted_first() -> None:
    """The tokenizer's error was raised in the caller of `abort`."""
    rig = Rig(script=[30])
    channel = rig.submit(max_tokens=5)
    await rig.steps(1)
    rig.core.abort("a")
    await rig.finish()
    assert isinstance(ending(channel), RequestError)
    assert rig.is_clean()


async def test_tokenizer_that_panics_fails_its_request_alone() -> None:
    """A panic is not an `Exception`: it went to the loop's exception handler, and the request never ended."""
    pool = HeldPool()
    rig = Rig(pool=pool)
    channel = rig.submit("text")
    pool.futures[0].set_exception(Panic("index out of bounds"))
    await rig.finish()
    error = ending(channel)
    assert isinstance(error, RequestError)
    assert "could not be encoded: Panic" in str(error)
    assert rig.is_clean()


async def test_request_that_cannot_even_be_given_to_the_tokenizers_ends() -> None:
    """A closed pool raised out of `submit`, and the request never ended."""
    rig = Rig(pool=BrokenPool())
    channel = rig.submit("text")
    await rig.finish()
    assert isinstance(ending(channel), EngineClosed)
    assert rig.is_clean()


async def test_aborted_while_encoding_is_never_scheduled() -> None:
    pool = HeldPool()
    rig = Rig(pool=pool)
    channel = rig.submit("text")
    rig.core.abort("a")
    assert isinstance(ending(channel), RequestAborted)
    assert pool.futures[0].cancelled()  # no worker needs to process it
    await rig.finish()
    assert rig.plans == []
    assert rig.is_clean()


async def test_too_large_request_is_refused_with_the_numbers() -> None:
    rig = Rig()
    channel = rig.submit(tuple(range(30)), max_tokens=35)
    await rig.finish()
    error = ending(channel)
    assert isinstance(error, RequestTooLarge)
    assert "at most 34" in str(error)
    assert rig.is_clean()


async def test_length_is_looked_at_before_the_token_ids() -> None:
    """The maximum of a million ids was computed first, which held the interpreter lock for 10 ms."""
    rig = Rig()
    channel = rig.submit((99,) * 65)  # too long, and outside the vocabulary of 32
    await rig.finish()
    assert isinstance(ending(channel), RequestTooLarge)


async def test_second_request_with_a_running_id_is_refused_and_the_first_continues() -> None:
    """Two threads with the same id: the second request replaced the first, which could no longer be aborted."""
    rig = Rig()
    first, second = rig.submit(name="a"), rig.submit(name="a")
    assert isinstance(ending(second), RequestError)
    await rig.finish()
    assert ids_of(first) == [5, 6]
    assert rig.is_clean()


async def test_abort_ends_a_request_at_once_and_its_blocks_follow_with_the_step() -> None:
    rig = Rig()
    channel = rig.submit(max_tokens=20)
    await rig.steps(2)
    rig.while_executing = lambda: rig.core.abort("a")
    await rig.core.step()
    error = ending(channel)
    assert isinstance(error, RequestAborted)
    assert isinstance(error.output, RequestOutput)
    assert error.output.generated_ids == [5, 6]
    assert error.output.outputs[0].finish_reason == "abort"
    assert error.output.error == str(error)
    assert channel.status is RequestStatus.CANCELLED
    assert rig.is_clean()


async def test_abort_before_the_model_has_begun_keeps_what_was_committed() -> None:
    """The last step's tokens are published during the next step; an abort in between must not lose them."""
    rig = Rig()
    channel = rig.submit(max_tokens=20)
    await rig.steps(1)
    rig.while_beginning = lambda: rig.core.abort("a")
    await rig.core.step()
    error = ending(channel)
    assert isinstance(error, RequestAborted)
    assert isinstance(error.output, RequestOutput)
    assert error.output.generated_ids == [5]
    assert [token for delta in await drain(channel) for token in delta.token_ids] == [5]


async def test_abort_of_a_request_whose_end_is_not_yet_published_has_no_effect() -> None:
    rig = Rig()
    first, second = rig.submit(name="a", max_tokens=1), rig.submit(name="b", max_tokens=2)
    await rig.steps(1)
    rig.while_beginning = lambda: rig.core.abort("a")
    await rig.core.step()
    assert ids_of(first) == [5]
    assert ids_of(second) == [5, 6]
    assert rig.trace.count("end") == 2


async def test_abort_of_ended_and_unknown_requests_means_nothing() -> None:
    rig = Rig()
    channel = rig.submit()
    await rig.finish()
    rig.core.abort("a")
    rig.core.abort("nobody")
    assert ids_of(channel) == [5, 6]
    assert rig.trace.count("end") == 1


async def test_completions_of_one_request_end_it_together() -> None:
    rig = Rig(script=lambda tokens, index: index)
    channel = rig.submit(max_tokens=2, n=3)
    await rig.steps(2)
    assert [out.token_ids for out in channel.outcome().outputs] == [[0, 0], [1, 1], [2, 2]]
    assert sorted(delta.index for delta in await drain(channel) if delta.finished) == [0, 1, 2]
    assert rig.trace.count("end") == 1
    assert rig.is_clean()


async def test_deadline_in_the_queue_ends_a_request_that_never_ran() -> None:
    rig = Rig(max_batch_size=1)
    first = rig.submit(name="a", max_tokens=5)
    await rig.steps(1)
    second = rig.submit(name="b", deadline=0.025)
    await rig.steps(3)
    error = ending(second)
    assert isinstance(error, DeadlineExceeded)
    assert second.status is RequestStatus.FAILED
    await rig.finish()
    assert len(ids_of(first)) == 5
    assert rig.is_clean()


async def test_deadline_in_mid_stream_keeps_what_was_generated() -> None:
    rig = Rig()
    rig.step_s = 100.0  # the timer of a deadline counts real seconds, and is not to fire
    channel = rig.submit(max_tokens=20, deadline=250.0)  # steps end at 100, 200, 300
    await rig.steps(4)
    error = ending(channel)
    assert isinstance(error, DeadlineExceeded)
    assert isinstance(error.output, RequestOutput)
    assert error.output.outputs[0].token_ids == [5, 6, 7]
    assert error.output.outputs[0].finish_reason == "deadline"
    deltas = await drain(channel)
    assert deltas[-1].finish_reason == "deadline"
    assert rig.is_clean()


async def test_first_token_deadline_is_over_with_the_first_token() -> None:
    rig = Rig(max_batch_size=1)
    first = rig.submit(name="a", max_tokens=4, ttft_deadline=0.015)
    await rig.steps(1)
    second = rig.submit(name="b", max_tokens=4, ttft_deadline=0.015)
    await rig.finish()
    assert len(ids_of(first)) == 4
    assert isinstance(ending(second), DeadlineExceeded)


async def test_deadline_that_passed_while_encoding_is_the_last_deltas_finish_reason() -> None:
    """The last delta had the finish reason "error"."""
    rig = Rig()
    rig.now = 5.0
    channel = rig.submit(deadline=4.0)
    await rig.finish()
    assert isinstance(ending(channel), DeadlineExceeded)
    assert (await drain(channel))[-1].finish_reason == "deadline"


async def test_deadline_expires_while_the_prompt_is_still_encoded() -> None:
    """Deadlines took effect only once the prompt's tokens were known."""
    pool = HeldPool()
    rig = Rig(pool=pool)
    channel = rig.submit("text", deadline=0.001)
    rig.now = 1.0
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(channel.wait(), PATIENCE_S)
    assert rig.is_clean()


async def test_deadline_expires_in_the_middle_of_a_step() -> None:
    """A sequence in the executing step ended only after the step."""
    rig = Rig()
    channel = rig.submit(max_tokens=20, deadline=0.001)
    rig.now = -1.0
    held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    inline = rig.core.step()
    rig.finish_step = lambda plan, future: held.add_done_callback(  # type: ignore[method-assign]
        lambda _: future.set_result(rig.model.execute(plan))
    )
    step = asyncio.create_task(inline)
    await asyncio.sleep(0)
    rig.now = 1.0
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(channel.wait(), PATIENCE_S)
    assert not step.done()
    held.set_result(None)
    await step
    assert rig.is_clean()


async def test_admission_is_given_back_when_a_request_starts() -> None:
    rig = Rig(max_batch_size=1)
    rig.submit(name="a")
    rig.submit(name="b")
    assert (rig.admission.num_requests, rig.admission.num_tokens) == (2, 6)
    await rig.steps(1)
    assert (rig.admission.num_requests, rig.admission.num_tokens) == (1, 3)


async def test_totals_count_requests_and_tokens() -> None:
    """Prompt tokens were never counted."""
    rig = Rig()
    rig.submit(name="a")
    rig.submit(name="b")
    await rig.finish()
    expected = {"requests": 2, "displaced_requests": 0, "prompt_tokens": 6, "generated_tokens": 4, "steps": 2}
    assert rig.metrics.totals == expected | {"drafted_tokens": 0, "accepted_tokens": 0}


async def test_latencies_are_those_that_the_reader_sees() -> None:
    """Steps take 10 ms. A step is published when the next one begins, or at once if there is none."""
    rig = Rig()
    rig.submit(max_tokens=3)
    rig.now = 0.5
    await rig.steps(3)
    figures = rig.metrics.summaries()
    assert figures["queue_time"]["latest"] == pytest.approx(0.5)
    assert figures["first_token_latency"]["latest"] == pytest.approx(0.51)
    assert figures["end_to_end_latency"]["latest"] == pytest.approx(0.53)
    gaps = figures["inter_token_latency"]
    assert (gaps["count"], gaps["min"], gaps["max"]) == (2, pytest.approx(0.01), pytest.approx(0.01))


async def test_a_request_leaves_the_queue_once_with_its_first_completion() -> None:
    rig = Rig(script=lambda tokens, index: index, max_batch_size=1)
    rig.submit(max_tokens=2, n=2)
    rig.now = 0.5
    await rig.finish()
    waits = rig.metrics.summaries()["queue_time"]
    assert (waits["count"], waits["max"]) == (1, pytest.approx(0.5))


async def test_gaps_between_the_tokens_of_several_completions_are_not_recorded() -> None:
    """Tokens of different completions arrive together: the time between them is no inter-token latency."""
    rig = Rig(script=lambda tokens, index: index)
    rig.submit(max_tokens=3, n=2)
    await rig.steps(3)
    assert "inter_token_latency" not in rig.metrics.summaries()


async def test_time_of_a_step_counts_the_hosts_work_since_the_last_one_but_no_idle_time() -> None:
    rig = Rig()
    plan = rig.scheduler.plan

    def slow(now: float) -> StepPlan:
        rig.now += 0.005
        return plan(now)

    rig.scheduler.plan = slow  # type: ignore[method-assign]
    running = asyncio.create_task(rig.core.run())
    await rig.submit(max_tokens=2).wait()
    rig.now += 100.0
    await rig.submit(max_tokens=1).wait()
    rig.core.stop()
    await running
    seconds = rig.metrics.summaries()["batch_processing_time"]
    assert (seconds["count"], seconds["max"]) == (3, pytest.approx(0.015))
    assert (seconds["min"], seconds["latest"]) == (pytest.approx(0.010), pytest.approx(0.010))


class TracedSpeculator:
    """Drafts nothing, and records its calls."""

    def __init__(self) -> None:
        self.trace: list[Any] = []
        self.rested = asyncio.Event()

    async def draft(self, on_begun: Callable[[], None]) -> None:
        self.trace.append("draft")

    def record(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        self.trace.append((len(plan.rows), len(result.rows), round(seconds, 3)))

    def forget_ended(self) -> None:
        if self.trace:  # the engine begins idle
            self.rested.set()


async def test_a_speculator_drafts_before_every_step_and_records_it_afterwards() -> None:
    speculator = TracedSpeculator()
    rig = Rig(speculator=speculator)
    rig.submit(max_tokens=2)
    await rig.steps(2)
    assert speculator.trace == ["draft", (1, 1, 0.01)] * 2


async def test_a_speculator_forgets_ended_sequences_when_the_engine_becomes_idle() -> None:
    speculator = TracedSpeculator()
    rig = Rig(speculator=speculator)
    running = asyncio.create_task(rig.core.run())
    await rig.submit(max_tokens=1).wait()
    await asyncio.wait_for(speculator.rested.wait(), PATIENCE_S)
    rig.core.stop()
    await running
    assert speculator.trace[:2] == ["draft", (1, 1, 0.01)]


async def test_candidates_are_shown_only_when_the_best_is_known() -> None:
    rig = Rig(script=lambda tokens, index: index)
    channel = rig.submit(max_tokens=2, best_of=3, n=1)
    await rig.steps(1)
    assert "publish" not in rig.trace
    await rig.finish()
    assert [delta.token_ids for delta in await drain(channel)] == [(0, 0)]


async def test_run_ends_only_when_everything_accepted_is_served() -> None:
    rig = Rig()
    channels = [rig.submit(name=str(i), max_tokens=3) for i in range(5)]
    await rig.finish()
    assert all(ids_of(channel) == [5, 6, 7] for channel in channels)


async def test_closing_ends_what_is_left_with_engine_closed() -> None:
    rig = Rig()
    channel = rig.submit(max_tokens=9)
    await rig.steps(1)
    rig.core.close(None)
    assert isinstance(ending(channel), EngineClosed)
    assert rig.core.num_requests == 0


async def test_closing_keeps_published_deltas_that_were_not_taken() -> None:
    rig = Rig()
    channel = rig.submit(max_tokens=9)
    await rig.steps(3)
    rig.core.close(None)
    deltas = await drain(channel)
    assert [token for delta in deltas for token in delta.token_ids] == [5, 6]
    assert [delta.finish_reason for delta in deltas] == ["abort"]


async def test_close_all_ends_everything() -> None:
    rig = Rig()
    channels = [rig.submit(name=str(i)) for i in range(3)]
    rig.core.close_all()
    assert all(isinstance(ending(channel), EngineClosed) for channel in channels)
    await rig.finish()
    assert rig.is_clean()


async def test_waiting_for_room_leaves_no_tasks_behind() -> None:
    """Each wait left a task that waited for the same event until the loop was closed."""
    rig = Rig(max_batch_size=1)
    rig.submit(max_tokens=3)
    before = asyncio.all_tasks()
    starving = {"left": 3}
    plan = rig.scheduler.plan

    def starve(now: float) -> StepPlan:
        starving["left"] -= 1
        return StepPlan(()) if starving["left"] > 0 else plan(now)

    rig.scheduler.plan = starve  # type: ignore[method-assign]
    await rig.finish()
    assert asyncio.all_tasks() <= before


async def test_a_beam_search_delivers_everything_at_once() -> None:
    rig = Rig(script=(5, 6, 7))
    channel = rig.submit(max_tokens=3, use_beam_search=True, best_of=2, temperature=0.0)
    await rig.steps(2)
    assert "publish" not in rig.trace
    await rig.finish()
    assert [(delta.token_ids, delta.finish_reason) for delta in await drain(channel)] == [((5, 6, 7), "length")]
    assert rig.metrics.totals["generated_tokens"] == 3
    assert rig.is_clean()


async def test_a_beam_search_that_is_aborted_leaves_nothing_behind() -> None:
    rig = Rig()
    channel = rig.submit(max_tokens=9, use_beam_search=True, best_of=3, temperature=0.0)
    await rig.steps(2)
    rig.core.abort("a")
    await rig.finish()
    assert isinstance(ending(channel), RequestAborted)
    assert rig.is_clean()


async def test_alike_completions_are_run_once() -> None:
    rig = Rig()
    channel = rig.submit(max_tokens=2, n=3, temperature=0.0)
    await rig.finish()
    assert max(len(plan.rows) for plan in rig.plans) == 1
    assert [out.token_ids for out in channel.outcome().outputs] == [[5, 6]] * 3
    assert sorted((delta.index, delta.finish_reason) for delta in await drain(channel)) == [
        (0, "length"),
        (1, "length"),
        (2, "length"),
    ]


async def test_a_function_of_the_callers_ranks_the_candidates() -> None:
    rig = Rig(script=lambda tokens, index: index)
    channel = rig.submit(max_tokens=2, best_of=3, rank_by=lambda output: output.token_ids[0])
    await rig.finish()
    [best] = channel.outcome().outputs
    assert (best.token_ids, best.score, best.index) == ([2, 2], 2.0, 0)


async def test_an_awaiting_task_is_woken_when_it_has_been_ranked() -> None:
    """Candidates are ranked on another thread, after the step's own wakeups were sent."""
    rig = Rig(script=lambda tokens, index: index)
    channel = rig.submit(max_tokens=1, best_of=2, rank_by=lambda output: output.token_ids[0])
    waiting = asyncio.create_task(channel.wait())
    await rig.steps(1)
    output = await asyncio.wait_for(waiting, PATIENCE_S)
    assert output.outputs[0].token_ids == [1]


async def test_a_ranking_that_fails_ends_its_own_request() -> None:
    def fail(output: Any) -> float:
        raise ValueError("no opinion")

    rig = Rig()
    channel, other = rig.submit(max_tokens=2, best_of=2, rank_by=fail), rig.submit(name="b")
    await rig.finish()
    assert isinstance(error := ending(channel), RequestError)
    assert "no opinion" in str(error)
    assert ids_of(other) == [5, 6]
    assert rig.is_clean()


async def test_a_request_can_be_aborted_while_it_is_ranked() -> None:
    asked, answer = threading.Event(), threading.Event()

    def wait(output: Any) -> float:
        asked.set()
        answer.wait(PATIENCE_S)
        return 1.0

    rig = Rig()
    channel = rig.submit(max_tokens=1, best_of=2, rank_by=wait)
    await rig.steps(1)
    assert await asyncio.to_thread(asked.wait, PATIENCE_S)
    rig.core.abort("a")
    assert isinstance(error := ending(channel), RequestAborted)
    assert error.output is not None
    answer.set()
    await rig.finish()
    assert rig.is_clean()


@pytest.mark.parametrize("kind", [OverflowError, Panic, SystemExit])
async def test_a_fault_in_ranking_ends_that_request_and_no_other(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """`length_penalty=400` raised an OverflowError in delivery: it ended the engine, and the request never ended."""

    def likelihood(params: SamplingParams, output: object) -> float:
        raise kind("no")

    monkeypatch.setattr(collector, "likelihood", likelihood)
    rig = Rig(script=lambda tokens, index: index)
    ranked = rig.submit(name="a", max_tokens=2, best_of=3)
    other = rig.submit(name="b", max_tokens=6)
    await rig.finish()
    assert isinstance(ending(ranked), RequestError)
    assert kind.__name__ in str(ending(ranked))
    assert (await drain(ranked))[-1].finish_reason == "error"
    assert len(ids_of(other)) == 6
    assert rig.is_clean()


async def test_closing_ends_a_request_whose_output_cannot_be_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the engine raised, and later requests never ended."""
    rig = Rig()
    broken, other = rig.submit(name="a", max_tokens=9, best_of=2), rig.submit(name="b", max_tokens=9)
    await rig.steps(2)
    monkeypatch.setattr(collector, "likelihood", lambda params, output: 1 / 0)
    rig.core.close(None)
    assert isinstance(ending(broken), EngineClosed)
    assert isinstance(ending(other), EngineClosed)
    assert rig.core.num_requests == 0


async def test_an_aborted_request_whose_output_cannot_be_put_together_still_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(script=lambda tokens, index: index)
    broken = rig.submit(name="a", max_tokens=9, best_of=2)
    await rig.steps(2)
    monkeypatch.setattr(collector, "likelihood", lambda params, output: 1 / 0)
    rig.core.abort("a")
    error = ending(broken)
    assert isinstance(error, RequestAborted)
    assert (error.output.prompt_token_ids, error.output.outputs[0].finish_reason) == ([1, 2, 3], "abort")
    await rig.finish()
    assert rig.is_clean()


async def test_a_step_that_fails_with_an_error_that_cannot_be_printed_ends_its_requests_like_any_other() -> None:
    """Formatting the error raised another one, and that ended the engine."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemExit(3)

    rig = Rig()
    failing = rig.submit(name="a")
    rig.model.fail_next(Mute())
    await rig.steps(1)
    other = rig.submit(name="b")
    await rig.finish()
    assert isinstance(ending(failing), ExecutionError)
    assert "the step failed: Mute" in str(ending(failing))
    assert ids_of(other) == [5, 6]


async def test_a_tokenizer_that_panics_while_encoding_on_the_loop_ends_its_request_alone() -> None:
    """An exception that is not an `Exception` ended the engine's thread."""

    class Panicking:
        chat_template = None
        panics = False

        def __getattr__(self, name: str) -> Any:
            raise Panic("index out of bounds") if self.panics else AttributeError(name)

    rig = Rig(tokenizer=(tokenizer := Panicking()))
    tokenizer.panics = True
    broken = rig.submit(name="a")
    fine = rig.submit(name="b", detokenize=False)
    await rig.finish()
    assert "Panic" in str(ending(broken))
    assert ids_of(fine) == [5, 6]
    assert rig.is_clean()


async def test_request_displaced_before_it_was_submitted_ends_with_that_error() -> None:
    """Its caller's thread was still between reserving the place and posting the request."""
    rig = Rig(max_queue_size=1, max_batch_size=1)
    rig.submit(name="busy", max_tokens=4)
    await rig.steps(1)
    place, channel = QueuePlace("low", 3, priority=1), Channel("low")
    rig.admission.reserve([place])
    lost = rig.admission.reserve([QueuePlace("high", 3, priority=3)])
    assert lost == [place]
    low = Request(id="low", prompt=read_prompt([1]), params=None, channel=channel, arrival=0.0, place=place)
    rig.core.submit([low], lost)
    assert isinstance(ending(channel), EngineOverloaded)
    assert rig.admission.num_requests == 1


async def test_a_displaced_waiting_request_ends_before_the_other_is_registered() -> None:
    rig = Rig(max_queue_size=1, max_batch_size=1)
    busy = rig.submit(name="busy", max_tokens=4)
    await rig.steps(1)
    low = rig.submit(name="low", priority=1)
    lost = rig.admission.reserve([QueuePlace("high", 3, priority=3)])
    rig.core.submit([], lost)
    assert isinstance(ending(low), EngineOverloaded)
    await rig.finish()
    assert len(ids_of(busy)) == 4


async def test_a_request_that_started_meanwhile_keeps_running_without_its_place() -> None:
    rig = Rig(max_queue_size=1)
    channel = rig.submit(name="a", max_tokens=3, priority=1)
    lost = rig.admission.reserve([QueuePlace("high", 3, priority=3)])
    await rig.steps(1)
    rig.core.submit([], lost)
    await rig.finish()
    assert len(ids_of(channel)) == 3
    assert rig.admission.num_requests == 1

"""Callbacks: the threads they run on, what they may call, and what happens when they raise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from penstock.api.callbacks import Callbacks
from penstock.api.channel import Channel, RequestStatus
from penstock.api.handle import RequestHandle
from penstock.api.transcript import Transcript
from penstock.api.waiting import Wakeups
from penstock.engine.inference import InferenceEngine
from penstock.errors import EngineClosed, EngineOverloaded, ExecutionError, RequestError
from penstock.models.scripted import ScriptedModel
from penstock.outputs import CompletionOutput, Delta, RequestOutput
from penstock.sampling import SamplingParams

ENDLESS = SamplingParams(max_tokens=1_000_000)  # more than an engine makes while a test's thread waits for its turn
PATIENCE_S = 60.0
FOREVER_S = 600.0  # a limit of the engine that is above the patience of a test
ENGINE_THREADS = ("penstock-engine", "penstock-model", "penstock-tokenizer")


def new_threads(earlier: set[threading.Thread]) -> set[threading.Thread]:
    """The threads of engines that have started since, but for those that encode text for all engines."""
    names = {*ENGINE_THREADS, "penstock-callbacks"}
    return {thread for thread in set(threading.enumerate()) - earlier if thread.name in names}


class Inbox:
    """Collects the arguments of callbacks and their threads; `last` is set with the last delta or the output."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.threads: set[str] = set()
        self.last = threading.Event()

    def __call__(self, item: Delta | RequestOutput) -> None:
        self.items.append(item)
        self.threads.add(threading.current_thread().name)
        if item.finished:
            self.last.set()

    async def later(self, item: Delta | RequestOutput) -> None:
        """The same, asynchronously."""
        await asyncio.sleep(0.05 if item.finished else 0)  # like a callback that writes to a disk or a socket
        self(item)

    @property
    def tokens(self) -> list[int]:
        """The tokens of all deltas."""
        return [token for delta in self.items for token in delta.token_ids]


@pytest.fixture(autouse=True)
def earlier_threads() -> set[threading.Thread]:
    """Those of engines that other tests share."""
    return set(threading.enumerate())


@pytest.fixture
def engine() -> Iterator[InferenceEngine]:
    """A scripted engine, stopped afterwards."""
    found = InferenceEngine(ScriptedModel([5, 6, 7]), batch_timeout_ms=0, max_sequence_length=None)
    yield found
    found.stop(0)


@pytest.fixture
def slow_engine() -> Iterator[InferenceEngine]:
    """An engine that makes 200 tokens a second at most."""
    found = new_slow_engine()
    yield found
    found.stop(0)


def new_slow_engine() -> InferenceEngine:
    return InferenceEngine(ScriptedModel([5], step_s=0.005), batch_timeout_ms=0, max_sequence_length=None)


def tokens(count: int) -> SamplingParams:
    """A request for that many tokens."""
    return SamplingParams(max_tokens=count)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_stream_callback_from_a_thread_without_a_loop(engine: InferenceEngine, kind: str) -> None:
    inbox = Inbox()
    engine.generate([1], tokens(20), callback=inbox if kind == "sync" else inbox.later)
    assert inbox.last.wait(PATIENCE_S)
    assert inbox.tokens == [5, 6, 7] * 6 + [5, 6]
    assert inbox.threads == {"penstock-callbacks"}


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_stream_callback_from_a_loop_runs_on_that_loop(engine: InferenceEngine, kind: str) -> None:
    inbox = Inbox()
    handle = engine.generate([1], tokens(20), callback=inbox if kind == "sync" else inbox.later)
    output = await handle
    while not inbox.last.is_set():  # noqa: ASYNC110 - the callback's turn comes after ours
        await asyncio.sleep(0)
    assert inbox.tokens == output.generated_ids
    assert inbox.threads == {threading.current_thread().name}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_final_callback_is_called_once_with_the_result(engine: InferenceEngine, kind: str) -> None:
    inbox = Inbox()
    request_id = engine.submit_request([1], tokens(4), callback=inbox if kind == "sync" else inbox.later)
    assert inbox.last.wait(PATIENCE_S)
    engine.stop()
    (output,) = inbox.items
    assert (output.request_id, output.generated_ids, output.error) == (request_id, [5, 6, 7, 5], None)
    assert not inbox.threads & {*ENGINE_THREADS}


def test_callback_may_call_back_into_the_engine(engine: InferenceEngine) -> None:
    inbox, inner = Inbox(), Inbox()
    stats: list[dict[str, Any]] = []

    def callback(delta: Delta) -> None:
        if not inbox.items:
            stats.append(engine.get_stats())
            engine.submit_request([1], tokens(3), callback=inner)
            engine.generate([1], tokens(3)).cancel()
        inbox(delta)

    engine.generate([1], tokens(10), callback=callback)
    assert inbox.last.wait(PATIENCE_S)
    assert inner.last.wait(PATIENCE_S)
    assert stats[0]["engine_status"] == "running"
    assert inner.items[0].generated_ids == [5, 6, 7]


def test_final_callback_may_stop_the_engine(engine: InferenceEngine) -> None:
    stopped = threading.Event()

    def stop(output: RequestOutput) -> None:
        engine.stop(5)
        stopped.set()

    engine.submit_request([1], tokens(3), callback=stop)
    assert stopped.wait(PATIENCE_S)
    with pytest.raises(EngineClosed):
        engine.generate([1])


@pytest.mark.parametrize("error", [ValueError("boom"), EngineOverloaded("full")])
def test_raising_callback_fails_its_request_alone(engine: InferenceEngine, error: Exception) -> None:
    """An error of our own type, raised by a call back into the engine, was ignored silently."""

    def fail(delta: Delta) -> None:
        raise error

    inbox = Inbox()
    failing = engine.generate([1], ENDLESS, callback=fail)
    engine.generate([1], tokens(30), callback=inbox)
    with pytest.raises(RequestError, match=f"the callback raised {type(error).__name__}"):
        failing.result(PATIENCE_S)
    assert inbox.last.wait(PATIENCE_S)
    assert len(inbox.tokens) == 30


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_stop_returns_after_the_last_callbacks(engine: InferenceEngine, kind: str) -> None:
    """The callbacks' loop was stopped in the iteration in which the last delta arrived, before any callback ran."""
    inboxes = [Inbox() for _ in range(20)]
    for inbox in inboxes:
        engine.submit_request([1], ENDLESS, callback=inbox if kind == "sync" else inbox.later)
    engine.stop(0)
    assert all(len(inbox.items) == 1 for inbox in inboxes)


def handle_of(channel: Channel) -> RequestHandle:
    """A handle whose engine ignores everything."""

    class Nobody:
        def abort(self, request_id: str) -> None:
            """Ignore it."""

    return RequestHandle(channel, Nobody())


def ended(error: BaseException | None = None, *transcripts: Transcript) -> RequestHandle:
    """A handle of a request that has ended."""
    channel, wakeups = Channel("a"), Wakeups()
    for transcript in transcripts:
        channel.put(transcript, wakeups)
    output = RequestOutput("a", None, [1], [CompletionOutput()], True)
    status = RequestStatus.FAILED if error else RequestStatus.COMPLETED
    channel.end(status, None if error else output, error, wakeups)
    return handle_of(channel)


async def settle() -> None:
    """Let every other task finish."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def test_final_callback_of_a_failed_request_gets_the_error() -> None:
    failures: list[Any] = []
    outputs: list[RequestOutput] = []
    callbacks = Callbacks(lambda *failure: failures.append(failure))
    callbacks.finish(ended(ExecutionError("boom")), outputs.append)
    await settle()
    assert [output.error for output in outputs] == ["boom"]
    assert failures == []


@pytest.mark.parametrize("start", ["stream", "finish"])
async def test_error_after_the_end_goes_to_the_loops_exception_handler(start: str) -> None:
    """There is no request left to fail, and the error was lost."""
    failures: list[Any] = []
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: contexts.append(context))
    error = ValueError("boom")

    def fail(item: object) -> None:
        raise error

    callbacks = Callbacks(lambda *failure: failures.append(failure))
    begin: Callable[[RequestHandle, Callable[[Any], Awaitable[None] | None]], None] = getattr(callbacks, start)
    transcript = Transcript("a")
    transcript.end("", "stop")
    begin(ended(None, transcript), fail)
    await settle()
    assert [context["exception"] for context in contexts] == [error]
    assert failures == []


async def test_error_in_mid_stream_fails_the_request() -> None:
    failures: list[Any] = []
    error = ValueError("boom")

    def fail(delta: Delta) -> None:
        raise error

    channel, wakeups = Channel("a"), Wakeups()
    channel.put(Transcript("a"), wakeups)
    Callbacks(lambda *failure: failures.append(failure)).stream(handle_of(channel), fail)
    await settle()
    assert failures == [("a", error)]


def test_closing_twice_or_unused_is_harmless(earlier_threads: set[threading.Thread]) -> None:
    callbacks = Callbacks(lambda request_id, error: None)
    callbacks.close()
    seen = Inbox()
    callbacks.finish(ended(), seen)
    callbacks.close()
    callbacks.close()
    assert len(seen.items) == 1
    assert not new_threads(earlier_threads)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_callback_that_exits_ends_its_request_and_not_the_thread_of_callbacks(
    engine: InferenceEngine, error: type[BaseException], kind: str, earlier_threads: set[threading.Thread]
) -> None:
    """`sys.exit()` ended the thread: later callbacks never ran, and `stop()` raised and freed nothing."""

    def leave(delta: Delta) -> None:
        raise error

    async def leave_later(delta: Delta) -> None:
        raise error

    inbox = Inbox()
    leaving = engine.generate([1], ENDLESS, callback=leave if kind == "sync" else leave_later)
    with pytest.raises(RequestError, match=f"the callback raised {error.__name__}"):
        leaving.result(PATIENCE_S)
    engine.submit_request([1], tokens(4), callback=inbox)
    assert inbox.last.wait(PATIENCE_S)
    engine.stop(0)
    assert not new_threads(earlier_threads)


def test_what_exits_programs_is_reported(engine: InferenceEngine, caplog: pytest.LogCaptureFixture) -> None:
    """The handle may have no reader."""

    def leave(delta: Delta) -> None:
        raise SystemExit(3)

    handle = engine.generate([1], ENDLESS, callback=leave)
    engine.stop()
    assert f"the callback of request {handle.request_id} raised an exit exception" in caplog.text


def test_an_error_that_cannot_be_printed_fails_its_request_alone(engine: InferenceEngine) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemExit(3)

    def fail(delta: Delta) -> None:
        raise Mute

    with pytest.raises(RequestError, match="the callback raised Mute"):
        engine.generate([1], ENDLESS, callback=fail).result(PATIENCE_S)


def test_on_a_loop_of_the_callers_an_exit_ends_the_loop_too(engine: InferenceEngine) -> None:
    """As in any other task there; the request has ended by then."""
    handles: list[RequestHandle] = []

    def leave(delta: Delta) -> None:
        raise SystemExit(3)

    async def main() -> None:
        handles.append(engine.generate([1], ENDLESS, callback=leave).detach())
        await asyncio.Event().wait()

    with pytest.raises(SystemExit):
        asyncio.run(main())
    with pytest.raises(RequestError, match="the callback raised SystemExit: 3"):
        handles[0].result(PATIENCE_S)


@pytest.mark.parametrize("kind", ["stop", "aclose"])
@pytest.mark.parametrize("drain", [0.0, FOREVER_S])
def test_an_engine_closes_at_once_in_its_own_callback(
    kind: str, drain: float, earlier_threads: set[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`await engine.aclose()` waited 10 s for the callback that awaited it."""
    monkeypatch.setattr("penstock.api.event_loop.GRACE_S", FOREVER_S)
    engine, done = new_slow_engine(), threading.Event()

    async def close(delta: Delta) -> None:
        await engine.aclose(drain)
        done.set()

    def stop(delta: Delta) -> None:
        engine.stop(drain)
        done.set()

    engine.generate([1], ENDLESS, callback=stop if kind == "stop" else close)
    assert done.wait(PATIENCE_S)
    for thread in new_threads(earlier_threads):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["stop", "aclose"])
async def test_an_engine_closes_at_once_in_a_callback_on_the_callers_loop(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.api.event_loop.GRACE_S", FOREVER_S)
    engine, done = new_slow_engine(), asyncio.Event()

    async def close(delta: Delta) -> None:
        await (engine.aclose(FOREVER_S) if kind == "aclose" else asyncio.sleep(0, engine.stop(FOREVER_S)))
        done.set()

    handle = engine.generate([1], ENDLESS, callback=close)
    await asyncio.wait_for(done.wait(), PATIENCE_S)
    assert handle.done()


def test_closing_in_a_callback_still_serves_the_other_requests(slow_engine: InferenceEngine) -> None:
    def stop(delta: Delta) -> None:
        slow_engine.stop()

    other = slow_engine.generate([1], tokens(200))
    own = slow_engine.generate([1], ENDLESS, callback=stop)
    assert len(other.result(PATIENCE_S).generated_ids) == 200
    with pytest.raises(EngineClosed):
        own.result(PATIENCE_S)


def test_what_cannot_be_called_is_refused_at_once(engine: InferenceEngine) -> None:
    wrong: Any = 5
    for call in (lambda: engine.generate([1], callback=wrong), lambda: engine.submit_request([1], callback=wrong)):
        with pytest.raises(RequestError, match="callback must be a function, got 5"):
            call()
    assert engine.get_stats()["queue"]["num_requests"] == 0

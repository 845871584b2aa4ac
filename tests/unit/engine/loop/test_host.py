"""The host's threads: start and stop from any thread, and no caller waits forever."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from penstock.api.channel import Channel, RequestStatus
from penstock.engine.loop.core import EngineCore
from penstock.engine.loop.host import Host, new_event_loop
from penstock.engine.loop.worker import Worker
from penstock.engine.requests.request import Request
from penstock.errors import ConfigurationError, EngineClosed
from penstock.scheduling.admission import QueuePlace

PATIENCE_S = 60.0


class Core:
    """The part of an `EngineCore` that the host uses; it serves until it is stopped and has no requests."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.requests: list[Request] = []
        self.stopping = False
        self.seen: list[str] = []
        self.fault: BaseException | None = None

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    async def run(self) -> None:
        while self.fault is None and not (self.stopping and not self.requests):
            self.wake.clear()
            await self.wake.wait()
        if self.fault is not None:
            raise self.fault

    def stop(self) -> None:
        self.stopping = True
        self.wake.set()

    def close_all(self) -> None:
        self.seen.append("close_all")
        self.requests.clear()
        self.wake.set()

    def refuse(self, request: Request, error: BaseException) -> None:
        self.seen.append(f"refused {request.id}: {type(error).__name__}")

    def close(self, error: BaseException | None) -> None:
        self.seen.append(f"closed with {error}")


def make(error: BaseException | None = None, gate: threading.Event | None = None) -> tuple[Host, Core]:
    """A host whose model loads until `gate` is set, or cannot be loaded."""
    core = Core()

    def load() -> None:
        if gate is not None:
            gate.wait(PATIENCE_S)
        if error is not None:
            raise error

    async def boot(worker: Worker) -> EngineCore:
        await worker.run(load).done
        return core  # type: ignore[return-value]

    return Host(boot), core


def request() -> Request:
    """Any request."""
    return Request(id="a", prompt=[1], params=None, channel=Channel("a"), arrival=0.0, place=QueuePlace("a", 1))


def on_engine(host: Host, function: Callable[[Core], Any]) -> Any:
    """The function's result on the engine's thread."""
    found: list[Any] = []
    done = threading.Event()

    def act(core: EngineCore) -> None:
        found.append(function(core))  # type: ignore[arg-type]
        done.set()

    host.post(act)
    assert done.wait(PATIENCE_S)
    return found[0]


def test_actions_run_on_the_engines_thread_in_order() -> None:
    host, _ = make()
    host.start()
    host.wait_ready()
    assert host.ready
    order: list[int] = []
    for number in range(10):
        host.post(lambda core, number=number: order.append(number))  # type: ignore[misc]
    assert on_engine(host, lambda core: threading.current_thread().name) == "penstock-engine"
    assert order == list(range(10))
    host.stop(10)
    assert host.closed


def test_actions_posted_while_the_model_loads_run_once_it_has() -> None:
    gate = threading.Event()
    host, core = make(gate=gate)
    host.start()
    host.post(lambda _: core.seen.append("early"))
    assert not host.ready
    gate.set()
    host.wait_ready()
    assert on_engine(host, lambda core: list(core.seen)) == ["early"]
    host.stop(10)


def test_failure_to_load_is_raised_in_waiting_callers_and_ends_the_requests() -> None:
    gate = threading.Event()
    host, _ = make(ConfigurationError("no such model"), gate)
    host.start()
    waiting = request()
    host.post(lambda core: None, [waiting])
    gate.set()
    with pytest.raises(ConfigurationError):
        host.wait_ready()
    with pytest.raises(ConfigurationError):
        waiting.channel.wait_blocking(PATIENCE_S)
    assert waiting.channel.status is RequestStatus.FAILED
    with pytest.raises(EngineClosed):
        host.post(lambda core: None)
    host.stop(10)


@pytest.mark.parametrize("error", [SystemExit(1), StopIteration(), asyncio.CancelledError()])
def test_model_that_exits_while_loading_is_reported_like_any_failure(error: BaseException) -> None:
    """Callers that waited for the model waited forever."""
    host, _ = make(error)
    host.start()
    with pytest.raises(Exception, match=type(error).__name__):
        host.wait_ready()


def test_started_from_many_threads_at_once_it_starts_once() -> None:
    """The second thread got "threads can only be started once", or posted before the engine existed."""
    host, core = make()
    barrier = threading.Barrier(8)
    errors: list[BaseException] = []

    def begin() -> None:
        barrier.wait(PATIENCE_S)
        try:
            host.start()
            host.post(lambda _: core.seen.append("posted"))
            host.wait_ready()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert errors == []
    assert on_engine(host, lambda core: core.seen) == ["posted"] * 8
    host.stop(10)


def test_host_that_never_started_is_stopped_at_once_and_stays_so() -> None:
    host, _ = make()
    host.stop(10)
    assert host.closed
    host.start()
    assert not host.started
    with pytest.raises(EngineClosed):
        host.wait_ready()
    with pytest.raises(EngineClosed):
        host.post(lambda core: None)


def test_draining_waits_for_requests_and_then_aborts_them() -> None:
    host, core = make()
    host.start()
    on_engine(host, lambda core: core.requests.append(request()))
    host.stop(0.05)
    assert core.seen == ["close_all", "closed with None"]


def test_draining_host_takes_aborts_but_no_requests() -> None:
    host, _ = make()
    host.start()
    on_engine(host, lambda core: core.requests.append(request()))
    stopping = threading.Thread(target=host.stop, args=(30,))
    stopping.start()
    stopped = threading.Event()
    while not on_engine(host, lambda core: core.stopping):
        stopped.wait(0.001)
    with pytest.raises(EngineClosed):
        host.post(lambda core: None, [request()])
    on_engine(host, lambda core: core.close_all())
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()


def test_stop_without_end_of_draining() -> None:
    """`Thread.join` does not accept infinity."""
    host, _ = make()
    host.start()
    host.stop(float("inf"))
    assert host.closed


def test_stop_on_the_engines_own_thread_returns_and_the_loop_ends() -> None:
    host, core = make()
    host.start()
    on_engine(host, lambda core: host.stop(0))
    host.stop(10)
    assert core.seen == ["close_all", "closed with None"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_death_of_the_loop_closes_the_host_with_its_error() -> None:
    host, core = make()
    host.start()
    error = RuntimeError("a bug of ours")

    def die(core: Core) -> None:
        core.fault = error
        core.wake.set()

    on_engine(host, die)
    host.stop(10)
    assert host.error is error
    assert core.seen == ["closed with a bug of ours"]
    with pytest.raises(EngineClosed) as caught:
        host.post(lambda core: None)
    assert caught.value.__cause__ is error


def test_on_close_is_called_as_soon_as_requests_are_refused() -> None:
    """Not only at the end of a drain."""
    host, _ = make()
    told: list[bool] = []
    host.on_close = lambda: told.append(host.closed)
    host.start()
    host.wait_ready()
    host.check_open()
    assert told == []
    host.stop(10)
    assert told == [False, True]
    with pytest.raises(EngineClosed):
        host.check_open()


def test_stopping_a_host_that_never_started_closes_it() -> None:
    host, _ = make()
    told: list[bool] = []
    host.on_close = lambda: told.append(host.closed)
    host.stop(10)
    assert told == [True]
    with pytest.raises(EngineClosed):
        host.check_open()


class Dropped:
    """Posts when it is collected, like the handle of a request."""

    def __init__(self, host: Host, seen: list[str]) -> None:
        self.host, self.seen, self.cycle = host, seen, self

    def __del__(self) -> None:
        self.host.post(lambda core: self_seen(self.seen))


def self_seen(seen: list[str]) -> None:
    """Record it."""
    seen.append("dropped")


class CollectingLoop:
    """A loop whose `call_soon_threadsafe` runs the garbage collector, as any allocation may."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def call_soon_threadsafe(self, *args: Any) -> Any:
        gc.collect()
        return self.loop.call_soon_threadsafe(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)


def test_garbage_that_posts_while_something_is_posted_does_not_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle collected under the host's lock needed that lock to abort its request."""
    loop = new_event_loop()
    monkeypatch.setattr("penstock.engine.loop.host.new_event_loop", lambda: CollectingLoop(loop))
    host, _ = make()
    host.start()
    host.wait_ready()
    seen: list[str] = []
    Dropped(host, seen)
    posting = threading.Thread(target=on_engine, args=(host, lambda core: None), daemon=True)
    posting.start()
    posting.join(PATIENCE_S)
    assert not posting.is_alive()
    on_engine(host, lambda core: None)
    assert seen == ["dropped"]
    host.stop(10)


@pytest.mark.parametrize("early", [False, True])
def test_an_action_that_fails_ends_its_requests_and_not_the_engine(early: bool) -> None:
    """After an unexpected exception on the engine's thread, the request never ended."""
    gate = threading.Event()
    host, _ = make(gate=gate)
    host.start()
    if not early:
        gate.set()
        host.wait_ready()

    def fail(core: EngineCore) -> None:
        raise SystemExit(3)

    host.post(fail, [request()])
    gate.set()
    assert on_engine(host, lambda core: list(core.seen)) == ["refused a: SystemExit"]
    host.stop(10)

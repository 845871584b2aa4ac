"""`Host`: the engine's two threads, one for its event loop and one for the model.

Owns start, stop and `post`, the only entry from other threads. Changes nothing global: it uses uvloop where installed,
but sets no event loop policy and handles no signals. Knows nothing about requests except how to fail them. Called by
`InferenceEngine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Sequence

from penstock.api.channel import RequestStatus
from penstock.api.event_loop import new_event_loop
from penstock.api.exiting import EXIT_S, block_loop_thread
from penstock.api.waiting import Waiter, Wakeups, new_waiter
from penstock.engine.loop.core import EngineCore
from penstock.engine.loop.gate import EngineState
from penstock.engine.loop.worker import Worker
from penstock.engine.requests.request import Request
from penstock.errors import EngineClosed, PenstockError, RequestError, described, text_of
from penstock.sequence import FinishReason

Action = Callable[[EngineCore], None]
Boot = Callable[[Worker], Awaitable[EngineCore]]


class Host:
    """Runs one `EngineCore`, which `boot` creates on the model's thread.

    `on_close` is called, without the lock, as soon as requests are refused, and again when the engine has ended.
    """

    def __init__(self, boot: Boot) -> None:
        self.on_close: Callable[[], None] = lambda: None
        self._boot: Boot | None = boot
        self._pid = os.getpid()
        self._worker = Worker("penstock-model")
        self._thread = threading.Thread(target=self._run, name="penstock-engine", daemon=True)
        # Guards the flags, so that every accepted post runs. Reentrant, because an allocation under the lock may start
        # the garbage collector, whose finalizers abort requests and so call `post`.
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._closed = False
        self._core: EngineCore | None = None
        self._early_posts: list[tuple[Action, Sequence[Request]]] = []
        self._boot_ended = threading.Event()
        self._boot_waiters: list[Waiter] = []  # for the end of boot, on any loops
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin to boot; returns at once. From any thread, any number of times; does nothing after `stop`."""
        with self._lock:
            if self._loop is None and not self._closed:
                self._loop = new_event_loop()
                self._thread.start()

    def wait_ready(self) -> None:
        """Block until the model is loaded. Raises the error of a failed boot, or `EngineClosed`."""
        if self.started:
            self._boot_ended.wait()
        if self.error is not None:
            raise self.error
        if not self.ready:
            raise EngineClosed("the engine was stopped: create a new one")

    @property
    def started(self) -> bool:
        """Whether the engine's thread was started."""
        return self._loop is not None

    @property
    def loading(self) -> bool:
        """Whether the model is being loaded now."""
        return self.started and not self._boot_ended.is_set()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and requests are being served."""
        return self._core is not None and not self._closed

    @property
    def num_requests(self) -> int:
        """The number of requests on the engine's thread that have not ended."""
        return 0 if self._core is None else self._core.num_requests

    @property
    def state(self) -> EngineState:
        """What the engine is doing; RUNNING before it is loaded."""
        return EngineState.RUNNING if self._core is None else self._core.gate.state

    @property
    def num_writes(self) -> int:
        """Rises when an update may begin to write weights, and when it has ended: while one does, it is odd."""
        return 0 if self._core is None else self._core.gate.num_writes

    @property
    def closed(self) -> bool:
        """Whether the engine has ended, by itself or through `stop`."""
        return self._closed

    @property
    def on_engine_thread(self) -> bool:
        """Whether the caller runs on one of the engine's threads, which must not wait for the engine."""
        return threading.get_ident() in (self._thread.ident, self._worker.ident)

    def post(self, action: Action, requests: Sequence[Request] = ()) -> None:
        """Run `action` on the engine's thread, after booting. Raises `EngineClosed`.

        `requests` are the requests that the action submits: they are refused once the engine stops, and fail with the
        error if booting or the action fails.
        """
        with self._lock:
            if self._loop is None or self._closed or (self._stopping and requests):
                raise self._closed_error() from self.error
            self._loop.call_soon_threadsafe(self._run_action, action, requests)

    def check_open(self) -> None:
        """Raise `EngineClosed` once requests are refused."""
        if self._closed or self._stopping:
            raise self._closed_error() from self.error

    def try_post(self, action: Action) -> None:
        """`post`, but does nothing once the engine has ended."""
        with contextlib.suppress(EngineClosed):
            self.post(action)

    def stop(self, drain_s: float) -> None:
        """Serve accepted requests for at most `drain_s` seconds, end the rest, join the threads.

        Called on one of the engine's own threads, where an engine may be garbage collected, it does not wait: the loop
        ends by itself after the step.
        """
        if os.getpid() != self._pid:
            return  # a forked child has none of the threads
        with self._lock:
            self._stopping = True
            self._closed = self._closed or self._loop is None
        self.on_close()
        if self._loop is None:
            return
        self.try_post(lambda core: core.stop())
        may_wait = not self.on_engine_thread
        if may_wait:
            self._boot_ended.wait()  # `drain_s` excludes the time to load
            self._thread.join(min(drain_s, threading.TIMEOUT_MAX))
        if self._thread.is_alive():
            self.try_post(lambda core: core.close_all())
        if may_wait:
            self._thread.join()

    async def wait_boot_ended(self) -> None:
        """Wait until the model is loaded or loading has failed. No thread waits, so this can be cancelled at once."""
        waiter = new_waiter()
        with self._lock:
            if not self.loading:
                return
            self._boot_waiters.append(waiter)
        try:
            await waiter
        finally:  # a cancelled future would keep the awaiting frames alive, and with them the engine
            with self._lock:
                if waiter in self._boot_waiters:
                    self._boot_waiters.remove(waiter)

    def fail_request(self, request_id: str, error: BaseException) -> None:
        """End a request whose callback raised an error."""
        wrapped = RequestError(f"the callback raised {described(error)}")
        self.try_post(lambda core: core.abort(request_id, FinishReason.ERROR, wrapped))

    def halt(self, until: float) -> None:
        """Stop both threads where they are, because the process exits. Requests are not ended."""
        if self._loop is not None:
            block_loop_thread(self._loop, self._thread, until)
            self._worker.halt(until)

    def _closed_error(self) -> EngineClosed:
        reason = "the engine was stopped" if self.error is None else f"the engine failed: {text_of(self.error)}"
        return EngineClosed(f"{reason}: create a new one")

    def _end_boot(self) -> None:
        with self._lock:
            self._boot_ended.set()
            waiters, self._boot_waiters = self._boot_waiters, []
        wakeups = Wakeups()
        wakeups.add(waiters)
        wakeups.send()

    def _run_action(self, action: Action, requests: Sequence[Request]) -> None:
        """Run an action. An error ends the action's requests; without any it is a bug, which the loop reports."""
        core = self._core
        if core is None:
            self._early_posts.append((action, requests))
            return
        try:
            action(core)
        except BaseException as error:
            if not requests:
                raise
            for request in requests:
                core.refuse(request, error)

    def _run(self) -> None:
        loop = self._loop
        assert loop is not None
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            try:
                runner.run(self._serve())
            finally:
                self._worker.shutdown()

    async def _serve(self) -> None:
        try:
            boot, self._boot = self._boot, None  # it refers to a borrowed module, which stop() must release
            assert boot is not None
            core = await boot(self._worker)
        except Exception as error:
            self.error = error
            if not threading.main_thread().is_alive():
                await asyncio.sleep(EXIT_S)  # perhaps loading failed because the process exits: do not report that
            await self._close(None)
            return
        self._core = core
        self._end_boot()
        early_posts, self._early_posts = self._early_posts, []
        for action, requests in early_posts:
            self._run_action(action, requests)
        try:
            await asyncio.create_task(core.run())  # of its own, so that a step resumes without passing through here
        except Exception as error:
            self.error = error
            raise
        finally:
            await self._close(core)

    async def _close(self, core: EngineCore | None) -> None:
        """End every open request, including those posted until now."""
        with self._lock:
            self._closed = True
        self.on_close()
        await asyncio.sleep(0)
        if core is not None:
            core.close(self.error)
        for _, requests in self._early_posts:
            for request in requests:
                _fail(request, self.error or EngineClosed("the engine was stopped"))
        self._early_posts.clear()
        self._end_boot()


def _fail(request: Request, error: BaseException) -> None:
    wakeups = Wakeups()
    if not isinstance(error, PenstockError):
        error = EngineClosed(f"the engine could not start: {text_of(error)}")
    request.channel.end(RequestStatus.FAILED, None, error, wakeups)
    wakeups.send()

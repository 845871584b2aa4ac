"""`Host`: the engine's own threads: one runs its event loop, one runs the model.

Owns starting, stopping and the only way in from other threads (`post`). Changes nothing global: the loop is uvloop's
where that is installed, but no policy is set, no signal handled. Knows nothing of requests beyond failing them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from penstock.engine.channel import RequestStatus, Wakeups
from penstock.engine.core import EngineCore
from penstock.engine.request import Request
from penstock.errors import EngineClosed, PenstockError

Action = Callable[[EngineCore], None]
Boot = Callable[[ThreadPoolExecutor], Awaitable[EngineCore]]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop loop where uvloop is installed, else the standard one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Host:
    """Runs one `EngineCore`, made by `boot` on the model's worker thread."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._loop = new_event_loop()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="penstock-model")
        self._thread = threading.Thread(target=self._run, name="penstock-engine", daemon=True)
        self._lock = threading.Lock()  # guards _closed against a post that would never run
        self._closed = False
        self._core: EngineCore | None = None
        self._early: list[tuple[Action, Request | None]] = []
        self._settled = threading.Event()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin to boot; returns at once."""
        self._thread.start()

    def wait_ready(self) -> None:
        """Block until the model is loaded. Raises what went wrong."""
        self._settled.wait()
        if self.error is not None:
            raise self.error

    @property
    def started(self) -> bool:
        """Whether `start()` was called."""
        return self._thread.ident is not None

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and requests are being served."""
        return self._core is not None and not self._closed

    @property
    def closed(self) -> bool:
        """Whether the engine has ended, by itself or when told to."""
        return self._closed

    def post(self, action: Action, request: Request | None = None) -> None:
        """Run `action` on the engine's thread, after booting. Raises `EngineClosed`.

        `request` is ended with the error should booting fail.
        """
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine was stopped") from self.error
            self._loop.call_soon_threadsafe(self._act, action, request)

    def stop(self, drain_s: float) -> None:
        """Serve what was accepted for at most `drain_s` seconds, end the rest, join the threads."""
        self._try_post(lambda core: core.stop())
        if threading.current_thread() is self._thread:
            return  # collected as garbage there: the loop ends by itself
        self._thread.join(drain_s)
        if self._thread.is_alive():
            self._try_post(lambda core: core.abort_all())
            self._thread.join()

    def _try_post(self, action: Action) -> None:
        try:
            self.post(action)
        except EngineClosed:
            return

    def _act(self, action: Action, request: Request | None) -> None:
        if self._core is None:
            self._early.append((action, request))
        else:
            action(self._core)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._serve())
            finally:
                self._worker.shutdown()

    async def _serve(self) -> None:
        try:
            core = await self._boot(self._worker)
        except Exception as error:
            self.error = error
            await self._close(None)
            return
        self._core = core
        self._settled.set()
        early, self._early = self._early, []
        for action, _ in early:
            action(core)
        try:
            await core.run()
        except Exception as error:
            self.error = error
            raise
        finally:
            await self._close(core)

    async def _close(self, core: EngineCore | None) -> None:
        """Nobody is left waiting: what slipped in until now is ended too."""
        with self._lock:
            self._closed = True
        await asyncio.sleep(0)
        if core is not None:
            core.close(self.error)
        for _, request in self._early:
            if request is not None:
                _fail(request, self.error or EngineClosed("the engine was stopped"))
        self._early.clear()
        self._settled.set()


def _fail(request: Request, error: BaseException) -> None:
    wakeups = Wakeups()
    if not isinstance(error, PenstockError):
        error = EngineClosed(f"the engine could not start: {error}")
    request.channel.end(RequestStatus.FAILED, None, error, wakeups)
    wakeups.send()

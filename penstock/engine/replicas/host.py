"""`RouterHost`: the thread and the event loop on which requests are routed, and the lifetime of all replicas.

Owns start and stop; every call from another thread enters the loop here. Knows nothing about requests except how to
pass them on. Called by `ReplicatedEngine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future

from penstock.api.event_loop import LoopThread
from penstock.api.waiting import call_on_loop, result_of
from penstock.engine.replicas.dispatcher import Dispatcher
from penstock.engine.replicas.replica import Replica
from penstock.engine.requests.request import Request
from penstock.errors import EngineClosed, PenstockError, RequestError, described, text_of
from penstock.scheduling.admission import QueuePlace
from penstock.sequence import FinishReason

Order = Callable[[], Coroutine[object, object, None]]


class RouterHost:
    """`booted` has a result once all replicas are loaded, or the error of one that could not be.

    `on_close` is called as soon as requests are refused.
    """

    def __init__(self, replicas: Sequence[Replica], dispatcher: Dispatcher) -> None:
        self.on_close: Callable[[], None] = lambda: None
        dispatcher.on_fault = lambda: self.on_close()
        self.booted = Future[None]()
        self._replicas = replicas
        self._dispatcher = dispatcher
        self._tasks: set[asyncio.Task[None]] = set()
        # Reentrant: an allocation under the lock may start the garbage collector, whose finalizers abort requests.
        self._lock = threading.RLock()
        self._thread: LoopThread | None = None
        self._is_stopping = False
        self._pid = os.getpid()

    @property
    def is_started(self) -> bool:
        """Whether the replicas were told to load."""
        return self._thread is not None

    @property
    def num_writes(self) -> int:
        """`Host.num_writes` of all replicas: odd while any of them may write."""
        counts = [replica.host.num_writes for replica in self._replicas]
        return sum(count + count % 2 for count in counts) + any(count % 2 for count in counts)

    @property
    def is_closed(self) -> bool:
        """Whether requests are refused because of `stop`."""
        return self._is_stopping

    def start(self) -> None:
        """Begin to load all replicas; returns at once. Does nothing if that was done, or after `stop`.

        Raises `EngineClosed` in a forked child.
        """
        with self._lock:
            if self._pid != os.getpid():
                raise EngineClosed("this engine was created before os.fork(): create a new one in the child process")
            if self._thread is not None or self._is_stopping:
                return
            self._thread = LoopThread("penstock-router")
            for replica in self._replicas:
                replica.host.start()
            call_on_loop(self._thread.loop, self._begin_boot)

    def boot(self) -> Future[None]:
        """`start`; the future that says when all replicas are loaded. Raises `EngineClosed` after `stop`."""
        self.start()
        if self._thread is None:
            raise EngineClosed("the engine was stopped: create a new one")
        return self.booted

    def submit(self, request: Request, displaced: Sequence[QueuePlace]) -> None:
        """Take a request in, whose place in the queue took those that are `displaced`. Raises `EngineClosed`."""
        with self._lock:
            call_on_loop(self._open_loop(), self._dispatcher.take_in, request, displaced)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT, error: Exception | None = None) -> None:
        """End a request, wherever it is; unknown and ended ids are ignored."""
        if self._thread is not None:
            call_on_loop(self._thread.loop, self._dispatcher.abort, request_id, reason, error)

    def fail_request(self, request_id: str, error: BaseException) -> None:
        """End a request whose callback raised an error."""
        self.abort(request_id, FinishReason.ERROR, RequestError(f"the callback raised {described(error)}"))

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the loop; does nothing while there is none."""
        if self._thread is not None:
            call_on_loop(self._thread.loop, function)

    async def carry_out(self, order: Order, undo: Order | None, *, can_be_cancelled: bool) -> None:
        """Run an order on the loop, and wait for it on any other. Raises `EngineClosed`.

        If the caller is cancelled, the order is given up if it can be. One that was carried out by then is undone.
        """
        is_carried_out = False

        async def run() -> None:
            nonlocal is_carried_out
            await order()
            is_carried_out = True  # before the future knows, which the caller may still cancel

        async def undo_if_carried_out() -> None:
            if undo is not None and is_carried_out:
                await undo()

        outcome = self._run(run)
        try:
            await result_of(outcome)
        except CancelledError:  # of the future, by the end of the loop; that of a caller is another class
            raise EngineClosed("the engine was stopped before the order was carried out") from None
        except BaseException:
            if can_be_cancelled:
                outcome.cancel()
            with contextlib.suppress(EngineClosed):
                self._run(undo_if_carried_out)
            raise

    def _run(self, coroutine: Order) -> Future[None]:
        with self._lock:
            loop = self._open_loop()
            return asyncio.run_coroutine_threadsafe(coroutine(), loop)

    def check_open(self) -> None:
        """Raise `EngineClosed` once requests are refused."""
        if (fault := self._dispatcher.fault) is not None:
            raise EngineClosed(str(fault))
        if self._is_stopping:
            raise EngineClosed("the engine was stopped: create a new one")

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        self.check_open()
        assert self._thread is not None, "start() comes first"
        return self._thread.loop

    def stop(self, drain_s: float) -> None:
        """Serve accepted requests for at most `drain_s` seconds, end the rest, stop the replicas, join the threads.

        Waits for running steps and for loading models.
        """
        if os.getpid() != self._pid:
            return  # a forked child has none of the threads
        with self._lock:
            self._is_stopping, thread = True, self._thread
        self.on_close()
        if thread is None:
            self._stop_replicas()  # exit handlers would keep them alive
            return
        with contextlib.suppress(Exception):  # `drain_s` excludes the time to load
            self.booted.result()
        self._dispatcher.is_draining = True  # at once: the replicas may have ended before the loop has its next turn
        call_on_loop(thread.loop, self._dispatcher.drain)
        self._dispatcher.drained.wait(min(drain_s, threading.TIMEOUT_MAX))
        call_on_loop(thread.loop, self._dispatcher.close_all)
        self._stop_replicas()
        thread.close(wait=True)

    def halt(self, until: float) -> None:
        """Stop the thread where it is, because the process exits."""
        if self._thread is not None:
            self._thread.halt(until)

    def _begin_boot(self) -> None:
        task = asyncio.get_running_loop().create_task(self._boot())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _boot(self) -> None:
        """Wait for all replicas; if one cannot load, none serves."""
        for replica in self._replicas:
            await replica.host.wait_boot_ended()
        try:
            for replica in self._replicas:
                replica.host.wait_ready()
            self._dispatcher.open()
        except Exception as error:
            text = text_of(error) if isinstance(error, PenstockError) else described(error)
            self._dispatcher.fail(EngineClosed(f"the engine failed: {text}: create a new one"))
            await asyncio.to_thread(self._stop_replicas)
            self.booted.set_exception(error)
        else:
            self.booted.set_result(None)

    def _stop_replicas(self) -> None:
        for replica in self._replicas:
            replica.stop()

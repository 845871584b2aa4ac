"""`EngineStart`: another engine starts on a thread of its own; `Processes`: what it starts in the meantime.

No process outlives a start that fails, is cancelled, or is cut off by the end of the program. Called by `VLLMEngine`
and `SGLangEngine`.
"""

from __future__ import annotations

import asyncio
import multiprocessing.util  # noqa: F401 - its exit handler waits for processes: those registered later run before it
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from penstock.api.exiting import halt_at_exit, interrupt, join_threads
from penstock.backends.child_process import run_with_parent
from penstock.errors import EngineClosed, ExecutionError, described

T = TypeVar("T")


class Processes:
    """The processes of one engine, which may start while another thread kills them."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._killed = threading.Event()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A block in which the processes that this thread starts are these. One such block at a time in a program."""
        thread, start = threading.get_ident(), BaseProcess.start

        def record(process: BaseProcess) -> None:
            if threading.get_ident() == thread:
                self._start(process, start)
            else:
                start(process)

        BaseProcess.start = record  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            BaseProcess.start = start  # type: ignore[method-assign]

    def _start(self, process: BaseProcess, start: Callable[[BaseProcess], None]) -> None:
        """Start a process. It is recorded before it can be killed, and killed here if that was asked for meanwhile."""
        process._target = partial(run_with_parent, os.getpid(), process._target)  # type: ignore[attr-defined]
        self._processes.append(process)
        if not self._killed.is_set():
            start(process)
        if self._killed.is_set():
            _kill(process)
            raise EngineClosed("the start of the engine was cancelled")

    def kill(self) -> None:
        """Kill all processes with their children; one that starts from now on is killed at once."""
        self._killed.set()
        for process in self._processes:
            _kill(process)

    def wait_until_killed(self) -> None:
        """Block until somebody kills them. Where a thread that has started a process ends, the process is killed."""
        self._killed.wait()

    def end(self) -> None:
        """Kill all processes with their children, and wait for them."""
        self.kill()
        for process in self._processes:
            if process.pid is not None:
                process.join()

    def __iter__(self) -> Iterator[BaseProcess]:
        return iter(self._processes)


class EngineStart(Generic[T]):
    """A call of `function` with `Processes` for what it starts, and `arguments`, on a daemon thread.

    A daemon thread, because the end of the program waits for all others. Not the main thread, on which the engine would
    install signal handlers. It stays until the processes are killed.
    """

    def __init__(self, function: Callable[..., T], *arguments: object) -> None:
        self.processes = Processes()
        self._future: Future[T] = Future()
        self._is_halted = False
        self._call = partial(function, self.processes, *arguments)
        self._thread = threading.Thread(target=self._run, name="penstock-start", daemon=True)

    async def result(self) -> T:
        """The result. If the caller is cancelled, the processes are killed, and the function is waited for.

        Raises `CancelledError` then, unless the function has succeeded by that time: its result has to be closed.
        """
        unregister = halt_at_exit(self)
        self._thread.start()
        waiting, is_cancelled = asyncio.wrap_future(self._future), False
        try:
            while not waiting.done():
                try:
                    await asyncio.wait([waiting])
                except asyncio.CancelledError:
                    is_cancelled = True
                    self.processes.kill()
        finally:
            unregister()
        if is_cancelled and waiting.exception() is not None:
            raise asyncio.CancelledError from waiting.exception()
        return waiting.result()

    def halt(self, until: float) -> None:
        """End the processes and the thread, because the program exits. Nobody is told of the failure."""
        self._is_halted = True
        self.processes.kill()
        join_threads([self._thread], until)
        interrupt(self._thread, until)

    def _run(self) -> None:
        try:
            self._future.set_result(self._call())
            self.processes.wait_until_killed()
        except BaseException as error:
            if not self._is_halted:
                self._future.set_exception(_loop_safe(error))


def _loop_safe(error: BaseException) -> Exception:
    """The error, or one for an exception that would end the task that waits for it, and its event loop."""
    return error if isinstance(error, Exception) else ExecutionError(f"the start ended with {described(error)}")


def _kill(process: BaseProcess) -> None:
    """Kill a process and its children. One that has not started, or has ended, is left alone: its id is another's."""
    import psutil  # a requirement of vLLM and of SGLang

    if process.pid is None or not process.is_alive():
        return
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        parent.suspend()  # so that it starts no others
        for child in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):
                child.kill()

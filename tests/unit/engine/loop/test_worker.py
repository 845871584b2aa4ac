"""The model's thread: jobs in order, one at a time, and with errors that an event loop can deliver."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from penstock.engine.loop.worker import Worker
from penstock.errors import ExecutionError

PATIENCE_S = 60.0


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker, shut down after the test."""
    found = Worker("model")
    yield found
    found.shutdown()


def raiser(error: BaseException) -> Callable[[], None]:
    """A function that raises."""

    def fail() -> None:
        raise error

    return fail


async def test_everything_runs_in_order_on_one_thread_of_that_name(worker: Worker) -> None:
    seen: list[tuple[int, int]] = []

    def note(number: int) -> str:
        seen.append((number, threading.get_ident()))
        return threading.current_thread().name

    names = await asyncio.gather(*(worker.run(note, i).done for i in range(20)))
    assert set(names) == {"model"}
    assert seen == [(i, worker.ident) for i in range(20)]


async def test_begun_completes_before_the_job_is_done(worker: Worker) -> None:
    turn = threading.Event()
    job = worker.run(turn.wait, PATIENCE_S)
    await asyncio.wait_for(job.begun, PATIENCE_S)
    assert not job.done.done()
    turn.set()
    assert await job.done


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # raised anywhere in the thread
async def test_a_halted_worker_interrupts_its_job_and_begins_no_other() -> None:
    worker, seen = Worker("halting"), list[int]()

    def spin() -> None:
        while True:
            seen.append(0) if not seen else None

    first = worker.run(spin)
    second = worker.run(seen.append, 1)
    await first.begun
    (thread,) = (each for each in threading.enumerate() if each.name == "halting")
    worker.halt(time.monotonic() + 30)
    assert not thread.is_alive()
    assert 1 not in seen
    assert not second.begun.done()


async def test_job_has_not_begun_while_another_one_runs(worker: Worker) -> None:
    turn = threading.Event()
    first, second = worker.run(turn.wait, PATIENCE_S), worker.run(int, "2")
    await first.begun
    assert not second.begun.done()
    turn.set()
    assert await second.done == 2
    assert second.begun.done()


async def test_errors_arrive_as_they_are(worker: Worker) -> None:
    error = ValueError("boom")
    with pytest.raises(ValueError, match="boom") as caught:
        await worker.run(raiser(error)).done
    assert caught.value is error


@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError(), SystemExit(1), GeneratorExit()])
async def test_errors_that_asyncio_cannot_deliver_arrive_as_one_that_it_can(
    worker: Worker, error: BaseException
) -> None:
    """The engine waited forever for a step that raised `StopIteration`. The other errors ended its loop."""
    with pytest.raises(ExecutionError, match=f"the model raised {type(error).__name__}") as caught:
        await asyncio.wait_for(worker.run(raiser(error)).done, PATIENCE_S)
    assert caught.value.__cause__ is error


async def test_cancelled_before_its_turn_never_runs(worker: Worker) -> None:
    turn = threading.Event()
    ran: list[int] = []
    worker.run(turn.wait, PATIENCE_S)
    second = worker.run(ran.append, 1)
    assert second.done.cancel()
    turn.set()
    await worker.run(ran.append, 2).done
    assert ran == [2]


async def test_cancelled_while_it_runs_delivers_no_result(worker: Worker) -> None:
    turn = threading.Event()
    job = worker.run(turn.wait, PATIENCE_S)
    await job.begun
    assert job.done.cancel()
    turn.set()
    assert await worker.run(int, "1").done == 1
    assert job.done.cancelled()


async def test_failed_job_leaves_nothing_behind(worker: Worker) -> None:
    """Future, error and traceback kept each other alive, and with them the step's tensors."""

    class Tensors:
        """The step's tensors."""

        def fail(self) -> None:
            raise ValueError("boom")

    async def run() -> weakref.ref[Tensors]:
        tensors = Tensors()
        with contextlib.suppress(ValueError):
            await worker.run(tensors.fail).done
        return weakref.ref(tensors)

    gc.disable()
    try:
        left = await run()
        await worker.run(int, "1").done
        assert left() is None
    finally:
        gc.enable()


async def test_shutdown_finishes_what_was_given_and_takes_no_more(worker: Worker) -> None:
    jobs = [worker.run(int, text) for text in "123"]
    worker.shutdown()
    assert await asyncio.gather(*(job.done for job in jobs)) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="shut down"):
        worker.run(int, "4")


def test_loop_that_has_ended_receives_no_result() -> None:
    worker, turn = Worker("model"), threading.Event()

    async def leave() -> None:
        await worker.run(turn.wait, PATIENCE_S).begun

    async def come() -> int:
        return await asyncio.wait_for(worker.run(int, "1").done, PATIENCE_S)

    asyncio.run(leave())
    turn.set()
    assert asyncio.run(come()) == 1, "an error in the worker's thread would have ended it"
    worker.shutdown()


def test_unused_worker_has_no_thread() -> None:
    worker = Worker("never")
    assert worker.ident is None
    worker.shutdown()
    assert "never" not in {thread.name for thread in threading.enumerate()}


async def test_an_error_that_cannot_be_printed_arrives(worker: Worker) -> None:
    """Formatting it raised another error, which ended the thread: no later job ever completed."""

    class Mute(BaseException):
        def __str__(self) -> str:
            raise SystemExit(3)

    with pytest.raises(ExecutionError, match="the model raised Mute"):
        await asyncio.wait_for(worker.run(raiser(Mute())).done, PATIENCE_S)
    assert await worker.run(int, "2").done == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # what ends the thread
async def test_jobs_of_a_thread_that_something_else_has_ended_fail() -> None:
    """Whoever waited for them waited forever, and so did every later request of the engine."""
    from ctypes import c_ulong, py_object, pythonapi

    worker = Worker("struck")
    await worker.run(int).done
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "struck"]
    assert pythonapi.PyThreadState_SetAsyncExc(c_ulong(worker.ident or 0), py_object(MemoryError)) == 1
    for _ in range(2):  # the first one wakes the thread, the second one finds it dead
        job = worker.run(int)
        await asyncio.wait_for(job.begun, PATIENCE_S)
        with pytest.raises(ExecutionError, match="thread of the model was ended by MemoryError"):
            await job.done
        await asyncio.to_thread(thread.join, PATIENCE_S)
    worker.shutdown()

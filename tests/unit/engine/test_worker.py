"""The model's thread: in order, one at a time, and with errors that an event loop can carry."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from penstock.engine.worker import Worker
from penstock.errors import ExecutionError


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker that is shut down again."""
    found = Worker("model")
    yield found
    found.shutdown()


def raiser(error: BaseException) -> Callable[[], None]:
    """A function that raises."""

    def fail() -> None:
        raise error

    return fail


def test_everything_runs_in_order_on_one_thread_of_that_name(worker: Worker) -> None:
    seen: list[tuple[int, int]] = []

    def note(number: int) -> str:
        seen.append((number, threading.get_ident()))
        return threading.current_thread().name

    names = [worker.submit(note, i) for i in range(20)]
    assert {name.result(5) for name in names} == {"model"}
    assert seen == [(i, worker.ident) for i in range(20)]


def test_errors_arrive_as_they_are(worker: Worker) -> None:
    error = ValueError("boom")
    assert worker.submit(raiser(error)).exception(5) is error


@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError(), SystemExit(1), GeneratorExit()])
async def test_errors_that_asyncio_cannot_carry_arrive_as_one_that_it_can(worker: Worker, error: BaseException) -> None:
    """A `StopIteration` out of a step was never delivered: the engine waited for that step for ever. The others
    ended its loop."""
    loop = asyncio.get_running_loop()
    with pytest.raises(ExecutionError, match=f"the model raised {type(error).__name__}") as caught:
        await asyncio.wait_for(loop.run_in_executor(worker, raiser(error)), 5)
    assert caught.value.__cause__ is error


def test_cancelled_before_its_turn_never_runs(worker: Worker) -> None:
    turn = threading.Event()
    ran: list[int] = []
    worker.submit(turn.wait, 5)
    second = worker.submit(ran.append, 1)
    assert second.cancel()
    turn.set()
    worker.submit(ran.append, 2).result(5)
    assert ran == [2]


def test_shutdown_finishes_what_was_submitted_and_takes_no_more(worker: Worker) -> None:
    futures = [worker.submit(int, text) for text in "123"]
    worker.shutdown()
    assert [future.result(0) for future in futures] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="shut down"):
        worker.submit(int, "4")


def test_unused_worker_has_no_thread() -> None:
    worker = Worker("never")
    assert worker.ident is None
    worker.shutdown()
    assert "never" not in {thread.name for thread in threading.enumerate()}

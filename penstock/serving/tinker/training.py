"""`TrainingThread`: the one thread on which all adapters are trained. Keys take turns, one job of each at a time.

The jobs of a key run in the order in which they came. An event loop only waits; a job that has begun runs to its end.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Items that wait, by owner; from any thread. Whoever was served last comes after all others that wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # none of them is empty; the next owner is the first

    def add(self, owner: str, item: T) -> None:
        """Let an item wait behind those of its owner."""
        with self._lock:
            self._waiting.setdefault(owner, deque()).append(item)

    def pop(self) -> T:
        """The first item of the next owner; there must be one."""
        with self._lock:
            owner, items = self._waiting.popitem(last=False)
            item = items.popleft()
            if items:
                self._waiting[owner] = items
            return item


class TrainingThread:
    """Starts with its first job. `owner` is the name of the key that a job is done for."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="penstock-training")
        self._turns: Turns[Callable[[], object]] = Turns()

    async def run(self, owner: str, job: Callable[[], T]) -> T:
        """The result of a job. Cancelling the caller drops a job that has not begun."""
        result = Future[T]()
        self.post(owner, lambda: _carry_out(job, result))
        return await asyncio.wrap_future(result)

    def post(self, owner: str, job: Callable[[], object]) -> None:
        """Run a job later; nobody waits for it."""
        self._turns.add(owner, job)
        self._executor.submit(lambda: self._turns.pop()())

    def close(self) -> None:
        """Finish the jobs that nobody has dropped."""
        self._executor.shutdown(wait=True)


def _carry_out(job: Callable[[], T], result: Future[T]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        value = job()
    except BaseException as error:
        result.set_exception(error)
        del result  # otherwise the error's traceback and the future keep each other alive
    else:
        result.set_result(value)

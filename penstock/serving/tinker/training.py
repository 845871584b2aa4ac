"""`TrainingThread`: the one thread on which all adapters are trained, in the order in which requests came.

Jobs of different sessions take turns there; an event loop only waits. A job that has begun runs to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class TrainingThread:
    """Starts with its first job."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="penstock-training")

    async def run(self, job: Callable[[], T]) -> T:
        """The result of a job. Cancelling the caller drops a job that has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, job)

    def post(self, job: Callable[[], object]) -> None:
        """Run a job later; nobody waits for it."""
        self._executor.submit(job)

    def close(self) -> None:
        """Finish the jobs that nobody has dropped."""
        self._executor.shutdown(wait=True)

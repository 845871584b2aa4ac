"""`restored_process`: another engine starts inside it and leaves the process as it was.

Called by what starts vLLM and SGLang, on threads on which no signal handler can be installed.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_starting = threading.Lock()  # what is restored belongs to the process


@contextmanager
def restored_process() -> Iterator[None]:
    """Take back changes of environment, event loop policy, start method of processes and garbage collection.

    One start at a time; others wait.
    """
    with _starting:
        environment, start_method = dict(os.environ), multiprocessing.get_start_method(allow_none=True)
        policy, thresholds = asyncio.get_event_loop_policy(), gc.get_threshold()
        try:
            yield
        finally:
            if multiprocessing.get_start_method(allow_none=True) != start_method:
                multiprocessing.set_start_method(start_method, force=True)
            if asyncio.get_event_loop_policy() is not policy:
                asyncio.set_event_loop_policy(policy)
            gc.set_threshold(*thresholds)
            _restore_environment(environment)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value

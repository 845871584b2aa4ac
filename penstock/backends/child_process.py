"""What a process of another engine does first: it asks to be killed when the program ends, however that happens.

Runs in these processes only; named by `engine_start`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def run_with_parent(parent: int, target: Callable[..., object], *arguments: object, **options: object) -> None:
    """Call `target`; on Linux, the process is killed as soon as the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            return
    target(*arguments, **options)

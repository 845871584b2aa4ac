"""`ThreadModes`: torch's gradient and autocast modes, which hold for one thread, carried over to another.

Importing this has the blocking faces of the engine carry them over to threads that they start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from penstock.api.blocking import thread_modes

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


class ThreadModes:
    """The modes of the thread that constructs this."""

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block of another thread in which they hold."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._gradients))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


thread_modes.append(lambda: ThreadModes().applied())

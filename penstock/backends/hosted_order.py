"""`HostedOrder`: a pause or an update of weights that its caller may leave before it has ended.

Used on the engine's loop by `HostedWeights`. `HostedEngine` makes one for each call, and says when the caller has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class HostedOrder:
    """`undo`, once it is set, takes the order back: it is called if the caller leaves without learning of its end."""

    def __init__(self) -> None:
        self.has_left = False
        self.undo: Callable[[], object] | None = None
        self._waiting: asyncio.Task[Any] | None = None

    async def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something that is given up if the caller leaves. Raises `CancelledError` then."""
        self._waiting = task = asyncio.ensure_future(work)
        if self.has_left:
            task.cancel()
        try:
            return await task
        finally:
            self._waiting = None

    def check(self) -> None:
        """Raise `CancelledError` if the caller has left."""
        if self.has_left:
            raise asyncio.CancelledError

    def leave(self) -> None:
        """The caller has left."""
        self.has_left = True
        if self._waiting is not None:
            self._waiting.cancel()
        elif self.undo is not None:
            self.undo()

"""`Drain`: how a server process ends: it waits for its open calls, says so, and aborts them when it is told again.

Handles no signals and closes nothing itself. Runs on the server's loop. Called by `process`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from penstock.serving.lifecycle import Lifecycle
from penstock.serving.settings import ServingSettings

REPORT_S = 5.0  # between two reports of what is waited for


class Drain:
    """`say` receives lines for the operator; `on_end` is called when the server may close its connections."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        settings: ServingSettings,
        say: Callable[[str], None],
        on_end: Callable[[], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._lifecycle = lifecycle
        self._settings = settings
        self._say = say
        self._on_end = on_end
        self._sleep = sleep
        self._num_signals = 0
        self._task: asyncio.Task[None] | None = None

    def signal(self) -> None:
        """The first time, begin to wait for the open calls; the second time, abort them; then wait for nothing."""
        self._num_signals += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())
        elif self._num_signals == 2:
            self._task.cancel()
            self._task = asyncio.get_running_loop().create_task(self._abort())
        else:
            self._on_end()

    async def _drain(self) -> None:
        delay_s, timeout_s = self._settings.drain_delay_s, self._settings.drain_timeout_s
        self._lifecycle.is_ready = False
        if delay_s:
            self._say(f"shutting down: not ready, accepting requests for another {delay_s:g} s; Ctrl-C again ends this")
            await self._sleep(delay_s)
        report = asyncio.get_running_loop().create_task(self._report(timeout_s))
        try:
            num_aborted = await self._lifecycle.drain(timeout_s)
        finally:
            report.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await report
        if num_aborted:
            self._say(f"aborted {_requests(num_aborted)} after {timeout_s:g} s (drain_timeout_s)")
        self._on_end()

    async def _report(self, left_s: float) -> None:
        """Say what is waited for, again and again."""
        while (num_open := self._lifecycle.num_open) and left_s > 0:
            wait = f"waiting for {_requests(num_open)}, for at most {left_s:.3g} s"
            self._say(f"shutting down: {wait}; Ctrl-C again (or a second signal) aborts them")
            await self._sleep(min(REPORT_S, left_s))
            left_s -= REPORT_S

    async def _abort(self) -> None:
        if num_open := self._lifecycle.num_open:
            self._say(f"aborting {_requests(num_open)}")
        await self._lifecycle.drain(0.0)
        self._on_end()


def _requests(number: int) -> str:
    return f"{number} open request{'' if number == 1 else 's'}"

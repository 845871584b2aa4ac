"""`VLLMWeights`: pauses of one `AsyncLLM`, and its weights; and calls into its process, which may die.

Runs on the loop of the `AsyncLLM`; called by `VLLMEngine`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from penstock.api.weights import UpdateMode
from penstock.backends.hosted_weights import HostedWeights
from penstock.errors import EngineClosed

T = TypeVar("T")
POLL_S = 0.2  # how often a wait for vLLM's process checks that it still runs


class VLLMWeights(HostedWeights):
    """Updates by vLLM's `reload_weights`."""

    engine = "vLLM"
    keeps = False

    def __init__(self, llm: Any, model: str) -> None:
        super().__init__(model)
        self._llm = llm

    async def _pause(self, mode: UpdateMode) -> None:
        await alive(self._llm, self._llm.pause_generation(mode=mode, clear_cache=True))

    async def _resume(self) -> None:
        await alive(self._llm, self._llm.resume_generation())

    async def _load(self, folder: Path, version: int) -> None:
        call = self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        await alive(self._llm, call)
        await alive(self._llm, self._llm.reset_prefix_cache())
        await alive(self._llm, self._llm.update_weight_version(str(version)))

    def _is_alive(self) -> bool:
        return not self._llm.errored


def dead() -> EngineClosed:
    """The error of everything that waits for a process that has ended."""
    return EngineClosed("vLLM's engine process ended: see its messages above, and make a new engine")


async def alive(llm: Any, call: Coroutine[Any, Any, T]) -> T:
    """The result of a call into vLLM's process. Raises `EngineClosed` if the process dies: vLLM would wait on."""
    task = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait([task], timeout=POLL_S))[0]:
            if llm.errored:
                raise dead()
    finally:
        task.cancel()
    if task.exception() is not None and llm.errored:
        raise dead() from task.exception()
    return task.result()

"""`VLLMWeights`: pauses of one `AsyncLLM`, and its weights.

Owns their state: whether it is paused, the folder of the latest update, the number of updates. Runs on the loop of the
`AsyncLLM`; called by `VLLMEngine`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from penstock.backends.weight_folder import check_folder
from penstock.errors import EngineClosed, EngineStateError, RequestError, WeightsError, shown, text_of

T = TypeVar("T")
POLL_S = 0.2  # how often a wait for vLLM's process checks that it still runs
_MODES = ("abort", "wait", "keep")


class VLLMWeights:
    """`model` is the name or folder of what the `AsyncLLM` has loaded."""

    def __init__(self, llm: Any, model: str) -> None:
        self._llm = llm
        self._model = model
        self._updating = asyncio.Lock()
        self._is_paused = False
        self._folder: Path | None = None  # of the latest update
        self.version = 0

    async def pause(self, mode: str) -> None:
        """See `VLLMEngine.pause`."""
        if mode not in _MODES:
            raise RequestError(f"mode={shown(mode)} is unknown: use 'abort', 'wait' or 'keep'")
        if self._is_paused:
            raise EngineStateError("the engine is paused already: call resume() first")
        self._is_paused = True
        await alive(self._llm, self._llm.pause_generation(mode=mode, clear_cache=True))

    async def resume(self) -> None:
        """See `VLLMEngine.resume`."""
        if not self._is_paused:
            raise EngineStateError("the engine is not paused")
        await alive(self._llm, self._llm.resume_generation())
        self._is_paused = False

    async def update(self, source: object, mode: str) -> int:
        """See `VLLMEngine.update_weights`."""
        if mode not in ("wait", "abort"):
            raise RequestError(f"mode={shown(mode)}: use 'wait' or 'abort' with vLLM, whose 'keep' reuses old K/V")
        folder = await asyncio.to_thread(check_folder, source, self._model)
        async with self._updating:
            if self._is_paused:
                await self._replace(folder)
            else:
                await self.pause(mode)
                try:
                    await self._replace(folder)
                finally:
                    if not self._llm.errored:
                        await self.resume()
            return self.version

    async def _replace(self, folder: Path) -> None:
        await self._reload(folder)
        await alive(self._llm, self._llm.reset_prefix_cache())
        self._folder, self.version = folder, self.version + 1
        await alive(self._llm, self._llm.update_weight_version(str(self.version)))

    async def _reload(self, folder: Path) -> None:
        """Load the folder; if that fails, the weights from before it."""
        try:
            await self._load(folder)
        except EngineClosed:
            raise
        except Exception as error:
            try:
                await self._load(self._folder or Path(self._model))
            except Exception:
                message = f"vLLM failed while it loaded {folder}, and holds weights of two kinds: stop this engine"
                raise WeightsError(f"{message} ({text_of(error)})", is_mixed=True) from error
            raise WeightsError(f"vLLM cannot load {folder}: {text_of(error)}") from error

    async def _load(self, folder: Path) -> None:
        call = self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        await alive(self._llm, call)


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
    return task.result()

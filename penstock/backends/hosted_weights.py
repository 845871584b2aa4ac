"""`HostedWeights`: pauses of one engine of another package, and its weights.

Owns their state: whether it is paused, the folder of the latest update, the number of updates. A subclass gives the
engine's own calls. Runs on the engine's loop; called by `HostedEngine`.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

from penstock.api.weights import UpdateMode, check_mode
from penstock.backends.hosted_order import HostedOrder
from penstock.backends.weight_folder import check_folder
from penstock.errors import EngineClosed, EngineStateError, RequestError, WeightsError, text_of


class HostedWeights(ABC):
    """`model` is the name or folder of what the engine has loaded, `engine` what errors call it."""

    engine: ClassVar[str]
    keeps: ClassVar[bool]  # whether an update can leave running requests to go on, with K/V computed anew

    def __init__(self, model: str) -> None:
        self._model = model
        self._changing = asyncio.Lock()  # held by whatever pauses, resumes or loads
        self._is_paused = False
        self._undoing: set[asyncio.Task[None]] = set()
        self._folder: Path | None = None  # of the latest update
        self.version = 0

    @abstractmethod
    async def _pause(self, mode: UpdateMode) -> None:
        """Run nothing more until `_resume`; raises `EngineClosed`."""

    @abstractmethod
    async def _resume(self) -> None:
        """Go on."""

    @abstractmethod
    async def _load(self, folder: Path, version: int) -> None:
        """Replace the weights, which are of this version from now on, and reuse no K/V of those so far.

        Raises whatever the engine raises.
        """

    @abstractmethod
    def _is_alive(self) -> bool:
        """Whether the engine's processes run."""

    async def pause(self, mode: UpdateMode, order: HostedOrder) -> None:
        """See `HostedEngine.pause`."""
        check_mode(mode)
        self._require_no_change()
        async with self._turn(order):
            await self._enter_pause(mode, order)
            order.undo = self._begin_to_undo_pause

    async def resume(self) -> None:
        """See `HostedEngine.resume`."""
        self._require_no_change()
        async with self._changing:
            await self._leave_pause()

    async def update(self, source: object, mode: UpdateMode, order: HostedOrder) -> int:
        """See `HostedEngine.update_weights`."""
        check_mode(mode)
        if mode == "keep" and not self.keeps:
            raise RequestError(f"mode='keep' reuses old K/V with {self.engine}: use 'wait' or 'abort'")
        folder = await asyncio.to_thread(check_folder, source, self._model)
        async with self._turn(order):
            if self._is_paused:
                await self._replace(folder)
            else:
                await self._enter_pause(mode, order)
                try:
                    await self._replace(folder)
                finally:
                    if self._is_alive():
                        await self._leave_pause()
            return self.version

    def _require_no_change(self) -> None:
        if self._changing.locked():
            raise EngineStateError("the engine is being paused, resumed or updated: wait until that has ended")

    @contextlib.asynccontextmanager
    async def _turn(self, order: HostedOrder) -> AsyncIterator[None]:
        """A block that holds the lock. Raises `CancelledError` if the caller leaves before it begins."""
        await order.wait_for(self._changing.acquire())
        try:
            order.check()
            yield
        finally:
            self._changing.release()

    async def _enter_pause(self, mode: UpdateMode, order: HostedOrder) -> None:
        """Pause. One that fails, or is left by its caller, is taken back, because the engine may have begun with it."""
        if self._is_paused:
            raise EngineStateError("the engine is paused already: call resume() first")
        try:
            await order.wait_for(self._pause(mode))
            order.check()
        except BaseException as error:
            self._is_paused = (order.has_left or isinstance(error, Exception)) and self._is_alive()
            if self._is_paused:  # unless the loop ends, or the engine has
                await self._leave_pause()
            raise
        self._is_paused = True

    def _begin_to_undo_pause(self) -> None:
        task = asyncio.get_running_loop().create_task(self._undo_pause())
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)

    async def _undo_pause(self) -> None:
        async with self._changing:
            if self._is_paused and self._is_alive():
                await self._leave_pause()

    async def _leave_pause(self) -> None:
        if not self._is_paused:
            raise EngineStateError("the engine is not paused")
        await self._resume()
        self._is_paused = False

    async def _replace(self, folder: Path) -> None:
        """Load the folder; if that fails, the weights from before it."""
        try:
            await self._load(folder, self.version + 1)
        except EngineClosed:
            raise
        except Exception as error:
            try:
                await self._load(self._folder or Path(self._model), self.version)
            except Exception:
                message = f"{self.engine} failed while it loaded {folder}, and holds weights of two kinds"
                raise WeightsError(f"{message}: stop this engine ({text_of(error)})", is_mixed=True) from error
            raise WeightsError(f"{self.engine} cannot load {folder}: {text_of(error)}") from error
        self._folder, self.version = folder, self.version + 1

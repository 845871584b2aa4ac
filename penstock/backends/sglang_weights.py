"""`SGLangWeights`: pauses of one SGLang engine, and its weights. Runs on its loop; called by `SGLangEngine`."""

from __future__ import annotations

from pathlib import Path

from penstock.api.weights import UpdateMode
from penstock.backends.hosted_weights import HostedWeights
from penstock.backends.sglang_process import SGLang
from penstock.errors import WeightsError


class SGLangWeights(HostedWeights):
    """Updates by SGLang's `update_weights_from_disk`."""

    engine = "SGLang"
    keeps = True

    def __init__(self, sglang: SGLang, model: str) -> None:
        super().__init__(model)
        self._sglang = sglang

    async def _pause(self, mode: UpdateMode) -> None:
        if mode == "wait":  # requests that run hold the lock for reading
            async with self._sglang.manager.model_update_lock.writer_lock:
                await self._stop("retract")
        else:
            await self._stop("abort" if mode == "abort" else "retract")

    async def _stop(self, mode: str) -> None:
        """Pause; "retract" leaves running requests without K/V, which are computed anew."""
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        await self._sglang.answer(self._sglang.manager.pause_generation(PauseGenerationReqInput(mode=mode)))

    async def _resume(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self._sglang.answer(self._sglang.manager.continue_generation(ContinueGenerationReqInput()))

    async def _load(self, folder: Path, version: int) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        order = UpdateWeightFromDiskReqInput(model_path=str(folder), weight_version=str(version), flush_cache=True)
        succeeded, words, *_ = await self._sglang.answer(self._sglang.manager.update_weights_from_disk(order))
        if not succeeded:
            raise WeightsError(words)

    def _is_alive(self) -> bool:
        return self._sglang.is_alive

"""`SGLangAdapters`: the LoRA adapters of one SGLang engine, by their names here.

Owns the names under which SGLang has them, one for every load, so that a name can be loaded again while its requests
run. Runs on the engine's loop; called by `SGLangEngine`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from itertools import count
from pathlib import Path
from typing import Any

from penstock.backends.sglang_process import SGLang
from penstock.errors import RequestError, WeightsError, shown


class SGLangAdapters:
    """Adapters are folders that peft wrote; SGLang reads nothing else."""

    def __init__(self, sglang: SGLang) -> None:
        self._sglang = sglang
        self._own_names: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._numbers = count(1)
        self._unloads: set[asyncio.Task[None]] = set()

    def names(self) -> list[str]:
        """The loaded adapters. Any thread."""
        return list(self._own_names)

    def generation(self, name: str) -> int:
        """The number of the load that made the adapter; 0 while none is loaded. Any thread."""
        return self._generations.get(name, 0)

    def own_name(self, name: str) -> str | None:
        """SGLang's name of an adapter; None for no adapter. Raises `RequestError` for an unknown one."""
        if not name:
            return None
        if name not in self._own_names:
            loaded = ", ".join(map(shown, self._own_names)) or "none"
            text = f"adapter {shown(name)} is not loaded (there is {loaded}): call load_adapter() first"
            raise RequestError(text, parameter="adapter")
        return self._own_names[name]

    async def load(self, name: str, source: object) -> None:
        """See `SGLangEngine.load_adapter`."""
        folder = await asyncio.to_thread(_check_folder, source)
        generation = next(self._numbers)
        own_name = f"{name}@{generation}"
        await self._carry_out(self._sglang.engine.async_load_lora_adapter(own_name, str(folder)), f"load {folder}")
        replaced, self._own_names[name] = self._own_names.get(name), own_name
        self._generations[name] = generation
        if replaced is not None:  # SGLang waits for the requests that run with it
            self._keep(asyncio.ensure_future(self._unload(replaced)))

    async def unload(self, name: str) -> None:
        """See `SGLangEngine.unload_adapter`: SGLang waits for the requests."""
        own_name = self.own_name(name)
        if own_name is None:
            raise RequestError("'' stands for no adapter: name one")
        del self._own_names[name], self._generations[name]
        await self._unload(own_name)

    async def _unload(self, own_name: str) -> None:
        await self._carry_out(self._sglang.engine.async_unload_lora_adapter(own_name), f"unload {own_name}")

    async def _carry_out(self, order: Coroutine[Any, Any, Any], words: str) -> None:
        result = await self._sglang.answer(order)
        if not result.success:
            raise WeightsError(f"SGLang cannot {words}: {result.error_message}")

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)


def _check_folder(source: object) -> Path:
    """The folder of an adapter, as an absolute path. Raises `WeightsError`."""
    if not isinstance(source, str | os.PathLike):
        raise WeightsError(f"SGLang reads adapters from folders, not {shown(source)}: pass what peft saved")
    folder = Path(source).absolute()
    if not (folder / "adapter_config.json").is_file():
        raise WeightsError(f"{folder} has no adapter_config.json: save the adapter there with save_pretrained")
    return folder

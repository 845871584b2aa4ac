"""`LoadedAdapters`: which saved adapters the engine holds, loaded when somebody samples from them.

Unloads those that were not used for the longest time, and never one that is in use. Runs on the server's loop only.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from penstock.api.protocols import WithAdapters
from penstock.errors import PenstockError, RequestError
from penstock.serving.tinker.checkpoints import Saved


@dataclass(slots=True, eq=False)
class Weights:
    """A saved adapter by the name that it has in the engine; `saved` is None once it is no longer kept."""

    name: str
    saved: Saved | None


_UNKNOWN = ""


@dataclass(slots=True, eq=False)
class _Entry:
    lock: asyncio.Lock
    num_users: int = 0
    loaded_id: str | None = None  # of what the engine holds under the name; _UNKNOWN after an order that was cut off


class LoadedAdapters:
    """At most `limit` adapters that nobody uses stay loaded."""

    def __init__(self, engine: WithAdapters, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        """Whether the engine's adapter of this name is one of these."""
        return name in self._entries

    @asynccontextmanager
    async def using(self, weights: Weights) -> AsyncIterator[str]:
        """A block in which the adapter is loaded; its name in the engine. Raises `RequestError`, `WeightsError`."""
        entry = self._entries.setdefault(weights.name, _Entry(asyncio.Lock()))
        self._entries.move_to_end(weights.name)
        entry.num_users += 1
        try:
            await self._load(weights, entry)
            yield weights.name
        finally:
            entry.num_users -= 1
            await self._evict()

    async def unload(self, weights: Weights) -> None:
        """Forget an adapter: nobody can begin to use it; what runs with it goes on."""
        weights.saved = None
        if (entry := self._entries.get(weights.name)) is not None:
            await self._unload(weights.name, entry, spares_users=False)

    async def _load(self, weights: Weights, entry: _Entry) -> None:
        async with entry.lock:
            saved = weights.saved
            if saved is None:
                raise RequestError("these weights are no longer kept: save them again, under a name to keep them")
            if entry.loaded_id == saved.info.id:
                return
            if not saved.is_there():
                raise RequestError("these weights were deleted or replaced: create another sampling client")
            entry.loaded_id = _UNKNOWN  # whoever is cancelled does not learn whether it was loaded
            await self._engine.load_adapter(weights.name, saved.folder)
            entry.loaded_id = saved.info.id

    async def _evict(self) -> None:
        unused = [name for name, entry in self._entries.items() if not entry.num_users]
        for name in unused[: max(0, len(unused) - self._limit)]:
            if (entry := self._entries.get(name)) is not None:
                await self._unload(name, entry, spares_users=True)

    async def _unload(self, name: str, entry: _Entry, *, spares_users: bool) -> None:
        async with entry.lock:  # whoever begins to use it meanwhile waits, and loads it again
            if spares_users and entry.num_users:
                return
            if entry.loaded_id is not None:
                entry.loaded_id = _UNKNOWN
                with suppress(PenstockError):  # the engine was stopped, or there is none
                    await self._engine.unload_adapter(name)
                entry.loaded_id = None
        if not entry.num_users:
            self._entries.pop(name, None)

"""`AdapterOrders`: loads, replaces and unloads adapters between two steps, while everything else goes on.

Owns the set of generations that the runner holds: a replaced one stays until no request runs with it. Orders are
coroutines on the engine's loop, carried out by the `Gate` for other threads; sources are read on a thread of their own,
and the matrices are written on the model's thread. Called for the methods of `Updates`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from penstock.engine.loop.gate import Gate, ModelJobs
from penstock.engine.requests.adapters import AdapterNames
from penstock.engine.requests.output_processor import OutputProcessor
from penstock.errors import EngineClosed, PenstockError, RequestAborted, WeightsError, described
from penstock.models.protocol import AdapterRunner, AdapterStore
from penstock.sequence import FinishReason


class AdapterOrders:
    """`abort(request_id, reason, error)` ends a request. Steps go on unless they wait for `gate` anyway."""

    def __init__(
        self,
        jobs: ModelJobs,
        names: AdapterNames,
        outputs: OutputProcessor,
        gate: Gate,
        abort: Callable[[str, FinishReason, Exception], None],
    ) -> None:
        self._jobs = jobs
        self._names = names
        self._outputs = outputs
        self._gate = gate
        self._abort = abort
        self._loaded: set[str] = set()

    async def load(self, name: str, source: object) -> None:
        """Load an adapter, or a new generation of it. Raises `WeightsError`, and then nothing has changed."""
        store = self._store()
        try:
            write = await asyncio.to_thread(store.read, source, name)
            key = self._names.new_key(name)
            try:
                await self._jobs.run(write, key).done
            except BaseException:
                self._jobs.run(store.unload, key)  # the caller may have left while it was written
                raise
        except PenstockError:
            raise
        except Exception as error:
            raise WeightsError(f"loading the adapter {name!r} failed: {described(error)}") from error
        self._loaded.add(key)
        self._names.put(name, key)
        self.drop_unused()

    async def unload(self, name: str) -> None:
        """End the requests of an adapter and forget it. Raises `RequestError` for an unknown name."""
        self._store()
        self._names.remove(name)
        for request_id, keys in self._running().items():
            if any(key.rpartition("@")[0] == name for key in keys):
                self._abort(request_id, FinishReason.ABORT, _unloaded(name))
        self.drop_unused()

    def drop_unused(self) -> None:
        """Free the generations that neither a new nor a running request can use."""
        unused = self._loaded - self._names.keys() - set().union(*self._running().values())
        for key in unused:
            self._jobs.run(self._store().unload, key)
        self._loaded -= unused

    def _store(self) -> AdapterStore:
        if self._gate.fault is not None:
            raise EngineClosed(self._gate.fault)
        if not isinstance(self._jobs.runner, AdapterRunner):
            raise WeightsError("this model takes no adapters: load one with transformers' layers")
        return self._jobs.runner.adapters

    def _running(self) -> dict[str, set[str]]:
        """The keys that each request runs with."""
        return {id: {seq.adapter for seq in request.sequences} for id, request in self._outputs.requests.items()}


def _unloaded(name: str) -> RequestAborted:
    return RequestAborted(f"the request was ended because its adapter {name!r} was unloaded")

"""`AdapterOrders`: loads, replaces and unloads adapters between two steps, while everything else goes on.

Owns the set of generations that the runner holds: one that was replaced or unloaded stays until no request runs with
it. Orders are coroutines on the engine's loop, started by the `Gate` for other threads; sources are read on a thread of
their own, and taken in on the model's thread. Called for the methods of `Updates`, and when a request ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.engine.loop.gate import Gate, ModelJobs
from penstock.engine.requests.adapters import AdapterNames
from penstock.engine.requests.output_processor import OutputProcessor
from penstock.engine.requests.request import Request
from penstock.errors import EngineClosed, EngineStateError, PenstockError, WeightsError, described, shown
from penstock.models.protocol import AdapterRunner, AdapterStore


class AdapterOrders:
    """The adapters of a runner. Steps go on during every order, unless they wait for `gate` anyway."""

    def __init__(self, jobs: ModelJobs, names: AdapterNames, outputs: OutputProcessor, gate: Gate) -> None:
        self._jobs = jobs
        self._names = names
        self._outputs = outputs
        self._gate = gate
        self._changing: set[str] = set()  # names whose adapters are being loaded
        self.held: set[str] = set()  # keys of the generations in the runner

    async def load(self, name: str, source: object) -> None:
        """Load an adapter, or a new generation of it. Raises `WeightsError`, and then nothing has changed.

        Raises `EngineStateError` while the same name is being loaded.
        """
        store = self._store()
        with self._exclusive(name):
            try:
                load, may_fail = await asyncio.to_thread(store.read, source, name)
                key = self._names.new_key(name)
                job = self._jobs.run(load, key)  # comes before any step whose requests name the adapter
                try:
                    if may_fail:
                        await job.done
                except BaseException:
                    self._jobs.run(store.unload, key)  # the caller may have left while it was loaded
                    raise
            except PenstockError:
                raise
            except Exception as error:
                raise WeightsError(f"loading the adapter {shown(name)} failed: {described(error)}") from error
        self.held.add(key)
        self._names.put(name, key)
        self.drop_unused()

    async def unload(self, name: str) -> None:
        """Refuse new requests of an adapter, and forget it after those that run. Raises `RequestError`."""
        self._store()
        self._require_idle(name)
        self._names.remove(name)
        self.drop_unused()

    def drop_unused(self) -> None:
        """Free the generations that neither a new nor a running request can use."""
        unused = self.held - self._names.keys()
        if not unused:
            return
        unused -= set().union(*map(_keys_of, self._outputs.requests.values()))
        for key in unused:
            self._jobs.run(self._store().unload, key)
        self.held -= unused

    def _require_idle(self, name: str) -> None:
        if name in self._changing:
            raise EngineStateError(f"adapter {shown(name)} is being loaded: wait until that has ended")

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        self._require_idle(name)
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.remove(name)

    def _store(self) -> AdapterStore:
        if self._gate.fault is not None:
            raise EngineClosed(self._gate.fault)
        if not isinstance(self._jobs.runner, AdapterRunner):
            raise WeightsError("this model takes no adapters: load one with transformers' layers")
        return self._jobs.runner.adapters


def _keys_of(request: Request) -> set[str]:
    """The generations that a request runs with, or will: a fork has that of its origin."""
    origin = set() if request.origin is None else {request.origin.adapter}
    return {seq.adapter for seq in request.sequences} | origin

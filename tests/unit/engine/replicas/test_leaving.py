"""Callers who leave an order in the middle, and engines that stop in the middle of one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock import EngineClosed, EngineStateError, ReplicatedEngine, RequestAborted, ScriptedModel, WeightsError
from penstock.api.log import engine_logger
from penstock.api.weights import SleepLevel
from penstock.config import EngineConfig
from penstock.engine.observe.metrics import Metrics
from penstock.engine.replicas.dispatcher import Dispatcher
from penstock.engine.replicas.host import RouterHost
from penstock.models.protocol import AdapterRead
from penstock.scheduling.admission import Admission
from penstock.scheduling.routing import by_prefix
from tests.unit.engine.replicas.scripted import (
    LONG,
    PATIENCE_S,
    engine_of,
    error_of,
    models,
    run,
    short,
    until,
)


class Slow(ScriptedModel):
    """A model that releases its memory only after `event`, and has begun to once `is_releasing` is set."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__([5], vocab_size=32)
        self._event, self.is_releasing = event, threading.Event()

    def unload(self, level: SleepLevel) -> None:
        self.is_releasing.set()
        self._event.wait(PATIENCE_S)


class Unable(ScriptedModel):
    """A model that cannot release its memory, and says so only after `event`."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__([5], vocab_size=32)
        self._event = event

    def unload(self, level: SleepLevel) -> None:
        self._event.wait(PATIENCE_S)
        raise WeightsError("not now")


class Adapters:
    """A store that calls `prepare` with the name of an adapter that it reads."""

    def __init__(self, prepare: Callable[[str], None]) -> None:
        self._prepare = prepare

    def read(self, source: object, name: str) -> AdapterRead:
        self._prepare(name)
        return AdapterRead(lambda key: None, may_fail=False)

    def unload(self, key: str) -> None:
        """Nothing is kept."""


def test_a_caller_who_leaves_while_a_refused_order_is_undone_leaves_no_replica_behind() -> None:
    """The replica that had fallen asleep was not woken, and the engine was asleep in part."""

    async def main(engine: ReplicatedEngine) -> None:
        task = asyncio.ensure_future(engine.sleep())
        await until(slow.is_releasing.is_set)
        task.cancel()
        await asyncio.wait([task])
        event.set()
        assert len((await engine.generate([1], short())).generated_ids) == 3
        assert {each["engine_status"] for each in engine.get_stats()["replicas"]} == {"running"}

    event = threading.Event()
    slow = Slow(event)
    run(main, engine_of([slow, Unable(slow.is_releasing)], tokenizer=None))


def test_a_caller_who_leaves_does_not_leave_an_adapter_on_some_replicas() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        task = asyncio.ensure_future(engine.load_adapter("a", ""))
        await until(lambda: engine.adapters == ["a"] and begun.is_set())
        task.cancel()
        await asyncio.wait([task])
        event.set()
        await engine.load_adapter("b", "")  # one after the other
        assert engine.adapters == ["b"]

    def refuse(name: str) -> None:
        begun.set()
        if name == "a":
            event.wait(PATIENCE_S)
            raise WeightsError("not these")

    begun, event, replicas = threading.Event(), threading.Event(), models()
    replicas[0].adapters, replicas[1].adapters = Adapters(lambda name: None), Adapters(refuse)
    run(main, engine_of(replicas))


def test_an_order_that_ends_while_its_caller_leaves_is_undone() -> None:
    """The future could still be cancelled when the order had been carried out, and then nothing undid it."""

    async def main() -> None:
        async def order() -> None:
            begun.set()
            assert left.wait(PATIENCE_S)  # blocks the router's loop, so that the caller's leaving comes after the end

        async def undo() -> None:
            undone.set()

        task = asyncio.ensure_future(host.carry_out(order, undo, can_be_cancelled=True))
        await until(begun.is_set)
        task.cancel()
        await asyncio.wait([task])
        left.set()
        await until(undone.is_set)

    begun, left, undone = threading.Event(), threading.Event(), threading.Event()
    config = EngineConfig()
    log = engine_logger(config)
    host = RouterHost([], Dispatcher([], config, Admission(config), Metrics(False), by_prefix, log))
    host.start()
    try:
        asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    finally:
        host.stop(0.0)


def test_an_update_whose_engine_stops_says_so() -> None:
    """It raised IndexError."""

    async def main() -> None:
        async with engine_of(models()) as engine:
            update = asyncio.ensure_future(engine.update_weights(source()))
            await until(begun.is_set)
            stop = asyncio.ensure_future(engine.aclose(0))
            await until(lambda: engine.get_stats()["engine_status"] == "stopped")
            await until(lambda: all(each["engine_status"] == "stopped" for each in engine.get_stats()["replicas"]))
            event.set()
            with pytest.raises(EngineClosed, match="the engine was stopped"):
                await update
            await stop

    def source() -> Iterator[tuple[str, Any]]:
        begun.set()
        event.wait(PATIENCE_S)
        yield "a", 1

    begun, event = threading.Event(), threading.Event()
    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_an_engine_that_is_paused_while_it_drains_waits_for_nothing() -> None:
    async def main() -> None:
        async with engine_of(models(), max_batch_size=1) as engine:
            running = [engine.generate([number] * 4, LONG) for number in range(2)]
            for handle in running:
                await anext(handle)
            pause = asyncio.ensure_future(engine.pause("wait"))
            await asyncio.sleep(0)  # it begins before the next order,
            assert isinstance(await error_of(engine.pause()), EngineStateError)  # which finds it being carried out
            waiting = engine.generate([9], short())
            stop = asyncio.ensure_future(engine.aclose(2 * PATIENCE_S))
            await until(lambda: engine.get_stats()["engine_status"] == "stopped")
            for handle in running:
                handle.cancel()
            await pause
            await stop
            assert isinstance(await error_of(waiting), EngineClosed | RequestAborted)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))

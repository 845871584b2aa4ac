"""`Orders`: weight updates, pauses and sleep, of all replicas as of one.

Owns nothing but which order is being carried out. An order goes to the gates of all replicas at once; where one of them
refuses, the others return to what they were. Runs on the router's loop. Called by `ReplicatedEngine`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from os import PathLike
from typing import TypeVar

from penstock.api.waiting import result_of
from penstock.api.weights import SleepLevel, UpdateMode, WeightSource
from penstock.engine.loop.core import EngineCore
from penstock.engine.loop.gate import REMEDIES, EngineState, aborted
from penstock.engine.replicas.dispatcher import Dispatcher
from penstock.engine.replicas.replica import Order, Replica
from penstock.errors import EngineClosed, EngineStateError, PenstockError, WeightsError, described, text_of

T = TypeVar("T")
# The weights that a replica follows: those of the live module, for a copy of it; None for the module itself.
Followed = Callable[[int], WeightSource]


class Orders:
    """`followed(number)` gives what a replica takes over where its owner has changed the weights in place."""

    def __init__(self, dispatcher: Dispatcher, followed: Followed) -> None:
        self._dispatcher = dispatcher
        self._followed = followed
        self._is_busy = False
        self._is_leaving = False  # its caller has left, and it is being undone
        self._is_free = asyncio.Event()
        self._adapters = asyncio.Lock()

    def release_models(self) -> None:
        """Keep no live module alive, because the engine is being stopped."""
        self._followed = lambda number: None

    async def begin_update(self, mode: UpdateMode) -> None:
        """Stop the steps of all replicas for weights that their owner writes. Raises `WeightsError`."""
        async with self._order():
            await self._check(self._followed)
            await self._begin(mode, self._followed)

    async def end_update(self, stale_kv: bool) -> None:
        """Have all replicas take over what their owner wrote, and let the steps go on."""
        async with self._order():
            await _uninterrupted(self._end(stale_kv, self._followed))

    async def abandon_update(self) -> None:
        """Let the steps go on after `begin_update` as if nothing had been asked."""
        async with self._order():
            await _ends(self._dispatcher.live(), lambda replica: _abandon)

    async def update(self, source: WeightSource, mode: UpdateMode, stale_kv: bool) -> None:
        """Give all replicas the weights of a source: all of them, or none, or the engine must be closed."""
        async with self._order():
            ready = await self._ready(source)
            sources: Followed = self._followed if ready is None else lambda number: ready
            await self._check(sources)
            await self._begin(mode, sources)
            await _uninterrupted(self._end(stale_kv, lambda number: None))  # what was read

    async def load_adapter(self, name: str, source: object) -> None:
        """Load an adapter on all replicas; if some cannot, it is then loaded on none."""
        async with self._adapters:
            await _uninterrupted(self._load_adapter(name, source))

    async def _load_adapter(self, name: str, source: object) -> None:
        errors = await self._on_all(lambda core: core.adapters.load(name, source))
        failures = [error for error in errors if error is not None]
        if 0 < len(failures) < len(errors):
            await self._on_all(lambda core: core.adapters.unload(name))
        if failures:
            raise failures[0]

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter on all replicas, and end the requests that wait for it."""
        async with self._adapters:
            errors = await _uninterrupted(self._on_all(lambda core: core.adapters.unload(name)))
            if failures := [error for error in errors if error is not None]:
                raise failures[0]

    async def _on_all(self, order: Order) -> list[Exception | None]:
        """An order about adapters, whose requests may find none of the K/V that they had before."""
        errors = await _ends(self._dispatcher.live(), lambda replica: order)
        self._dispatcher.forget_prefixes()
        return errors

    async def pause(self, mode: UpdateMode) -> None:
        """Stop the steps of all replicas until `resume`."""
        async with self._order():
            await self._stop(mode, lambda replica: lambda core: core.gate.pause(mode), _resume)

    async def resume(self) -> None:
        """Let the steps go on after `pause`."""
        async with self._order():
            await self._all(lambda replica: _resume, lambda core: core.gate.pause("keep"))

    async def sleep(self, level: SleepLevel, mode: UpdateMode) -> None:
        """Stop the steps of all replicas until `wake`, and release memory."""
        async with self._order():
            await self._stop(mode, lambda replica: lambda core: core.gate.sleep(level, mode), _wake)
            if level != "weights":
                self._dispatcher.forget_prefixes()

    async def wake(self) -> None:
        """Take the memory back; where one replica cannot, all stay asleep, with the weights that they have by then."""
        async with self._order():
            try:
                await self._all(lambda replica: _wake, lambda core: core.gate.sleep("cache", "keep"))
            except BaseException:
                self._dispatcher.forget_prefixes()
                raise

    @contextlib.asynccontextmanager
    async def _order(self) -> AsyncIterator[None]:
        """Hand nothing over while an order is carried out; afterwards, if the replicas run.

        Raises `EngineStateError` beside another order.
        """
        while self._is_leaving:
            await self._is_free.wait()
        if self._is_busy:
            state = EngineState.CHANGING
            raise EngineStateError(f"this is not possible: the engine is {state}; {REMEDIES[state]}")
        dispatcher = self._dispatcher
        self._is_busy, dispatcher.state = True, EngineState.CHANGING
        try:
            yield
        finally:
            self._is_busy = self._is_leaving = False
            self._is_free.set()
            self._is_free.clear()
            with contextlib.suppress(EngineClosed):
                dispatcher.settle(dispatcher.live()[0].host.state)

    # Steps of an order.

    async def _ready(self, source: WeightSource) -> WeightSource:
        """A source that every replica can read: a folder is read once, and an iterator to its end."""
        if isinstance(source, str | PathLike):
            ready: list[WeightSource] = []
            await result_of(self._dispatcher.live()[0].order(lambda core: core.gate.read(source, ready)))
            return ready[0]
        if source is None or isinstance(source, Mapping) or not isinstance(source, Iterable):
            return source
        try:
            return await asyncio.to_thread(list, source)
        except Exception as error:
            reason = text_of(error) if isinstance(error, PenstockError) else described(error)
            raise WeightsError(f"reading the weights failed: {reason}; nothing was written") from error

    async def _check(self, sources: Followed) -> None:
        """Have every replica check its weights before any of them disturbs a request. Raises `WeightsError`."""

        def order(replica: Replica) -> Order:
            return lambda core: core.gate.read(sources(replica.number), [])

        await self._all(order, None)

    async def _begin(self, mode: UpdateMode, sources: Followed) -> None:
        def order(replica: Replica) -> Order:
            return lambda core: core.gate.begin_update(mode, sources(replica.number))

        await self._stop(mode, order, _abandon)

    async def _end(self, stale_kv: bool, sources: Followed) -> None:
        """Have every replica write; unless all of them did, or none, refuse everything from here on."""

        def order(replica: Replica) -> Order:
            return lambda core: core.gate.end_update(stale_kv, sources(replica.number))

        outcomes = await _ends(self._dispatcher.live(), order)
        errors = [error for error in outcomes if error is not None]
        if not stale_kv:
            self._dispatcher.forget_prefixes()
        if not errors:
            self._dispatcher.live()
            return
        mixed = next((error for error in errors if not isinstance(error, WeightsError) or error.is_mixed), None)
        if mixed is None and len(errors) == len(outcomes):
            raise errors[0]
        cause = mixed or errors[0]
        text = f"{text_of(cause)}; the replicas have different weights: close the engine"
        self._dispatcher.fail(EngineClosed(f"an update of the weights failed half way, close the engine: {text}"))
        raise WeightsError(text, is_mixed=True) from cause

    async def _stop(self, mode: UpdateMode, order: Callable[[Replica], Order], undo: Order) -> None:
        """Stop the steps; with "abort", end the requests that no replica has taken, too."""
        waiting = self._dispatcher.waiting()
        await self._all(order, undo)
        if mode == "abort":
            self._dispatcher.end_waiting(waiting, aborted)

    async def _all(self, order: Callable[[Replica], Order], undo: Order | None) -> None:
        """Carry out an order on all replicas that serve; if one refuses, or the caller leaves, undo it on the others.

        Raises the first error, and `EngineClosed` where no replica is left.
        """
        ordered = {replica: replica.order(order(replica)) for replica in self._dispatcher.live()}
        ends = {replica: asyncio.ensure_future(_end(replica, outcome)) for replica, outcome in ordered.items()}
        pending = set(ends.values())
        try:
            while pending and not any(end.done() and end.result() for end in ends.values()):
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._is_leaving = True
        error = next((error for end in ends.values() if end.done() and (error := end.result())), None)
        for replica, outcome in ordered.items():
            if ends[replica] in pending:
                replica.give_up(outcome)
        try:
            await _uninterrupted(asyncio.wait(ends.values()))
        except asyncio.CancelledError:
            self._is_leaving = True
        if error is not None or self._is_leaving:
            if undo is not None:
                done = [replica for replica, end in ends.items() if end.result() is None]
                await _uninterrupted(_ends(done, lambda replica: undo))
            raise asyncio.CancelledError if error is None else error
        self._dispatcher.live()


def _abandon(core: EngineCore) -> Coroutine[object, object, None]:
    return core.gate.abandon_update()


def _resume(core: EngineCore) -> Coroutine[object, object, None]:
    return core.gate.resume()


def _wake(core: EngineCore) -> Coroutine[object, object, None]:
    return core.gate.wake()


async def _ends(replicas: Sequence[Replica], order: Callable[[Replica], Order]) -> list[Exception | None]:
    """Carry out an order on replicas; the error of each or None, without those that have failed as a whole."""
    outcomes = [replica.order(order(replica)) for replica in replicas]
    errors = await asyncio.gather(*map(_end, replicas, outcomes))
    return [error for replica, error in zip(replicas, errors, strict=True) if not replica.has_ended]


async def _end(replica: Replica, outcome: Future[None]) -> Exception | None:
    """Wait for an order; its error, unless the replica has failed as a whole."""
    try:
        await result_of(outcome)
    except Exception as error:
        return None if replica.has_ended else error
    return None


async def _uninterrupted(work: Awaitable[T]) -> T:
    """Await to the end although the caller is cancelled, which it is afterwards."""
    task, has_left = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            has_left = True
        except BaseException:
            break  # of the task itself
    if has_left:
        raise asyncio.CancelledError
    return task.result()

"""`Updates`: new weights and adapters while an engine serves, and pauses: methods of `Trainable` and `WithAdapters`.

Orders go to the `Gate` on the engine's loop, from any thread and event loop. Holds no state but that of one `async
with` block. The base of `InferenceEngine`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from penstock.api.waiting import result_of
from penstock.api.weights import SleepLevel, UpdateMode, WeightSource, check_level, check_mode
from penstock.engine.assembly import Parts
from penstock.engine.loop.core import EngineCore
from penstock.engine.loop.host import Host
from penstock.errors import EngineStateError, RequestError, described
from penstock.values import text

Order = Callable[[EngineCore], Coroutine[object, object, None]]


class _Loading(Protocol):
    """An engine that loads its model when it is first used."""

    _host: Host

    async def _loaded_soon(self) -> Parts: ...

    @property
    def weight_version(self) -> int: ...


class UpdateBlock:
    """The block of `updating`: `begin` stops the steps, `end` lets them go on."""

    def __init__(self, begin: Callable[[], Awaitable[None]], end: Callable[[], Awaitable[None]]) -> None:
        self._begin = begin
        self._end = end
        self._has_begun = False

    async def __aenter__(self) -> None:
        await self._begin()
        self._has_begun = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._has_begun:  # it would end another block's update
            raise EngineStateError("this update has not begun, or has ended: use `async with engine.updating()`")
        self._has_begun = False
        try:
            await self._end()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"The end of the weight update failed as well: {described(failure)}")


class Updates:
    """Methods of `InferenceEngine`.

    `mode` says what becomes of the requests. "abort": all of them, waiting ones too, end with `RequestAborted`, whose
    `output` has what was generated, with as many ids as logprobs and versions. "wait": those that have started end
    first, while new ones wait. "keep": those that run go on afterwards, after their K/V have been computed again. An
    order that does not fit the engine's state raises `EngineStateError`; cancelling one that still waits undoes it.
    """

    def updating(self: _Loading, mode: UpdateMode = "abort", *, stale_kv: bool = False) -> UpdateBlock:
        """A block for a change of the live module's weights: `async with engine.updating(): optimizer.step()`.

        No step runs inside the block; requests wait. At its end, whether or not an exception leaves it, copies of
        weights are refreshed, `weight_version` rises by one, and earlier K/V are not found any more: the engine serves
        the module as it is then. With mode "keep" and `stale_kv`, running requests go on with the K/V of the old
        weights, which is faster and no longer exact; their outputs have `stale_kv=True`. Do not await a request inside
        the block. Raises `RequestError`, `EngineStateError`, `EngineClosed`, and `WeightsError` where this engine
        cannot follow its module.
        """
        check_mode(mode, stale_kv)
        return UpdateBlock(
            lambda: _carry_out(self, lambda core: core.gate.begin_update(mode)),
            lambda: _carry_out(self, lambda core: core.gate.end_update(stale_kv), can_be_cancelled=False),
        )

    async def update_weights(
        self: _Loading, source: WeightSource = None, *, mode: UpdateMode = "abort", stale_kv: bool = False
    ) -> int:
        """Give the model new weights between two steps, on the model's thread; returns the new `weight_version`.

        `source` is a state dict, a folder of safetensors that `save_pretrained` wrote, (name, tensor) pairs, or None
        for a live module that was changed already. A borrowed module's own tensors are written. Names and shapes are
        checked before requests are disturbed, those of an iterator as its tensors come; it is read on the model's
        thread. A folder has to hold all weights; what other sources do not name stays. `mode` and `stale_kv` are those
        of `updating`. Raises `WeightsError`: the old weights stay, unless its `is_mixed` says that the engine must be
        closed; also `RequestError`, `EngineStateError`, `EngineClosed`.
        """
        check_mode(mode, stale_kv)
        await _carry_out(self, lambda core: core.gate.update(source, mode, stale_kv))
        return self.weight_version

    @contextmanager
    def reading_weights(self: _Loading) -> Iterator[int]:
        """A block that needs the weights as they are: `with engine.reading_weights() as version: model(ids)`.

        Prevents no update, but raises `EngineStateError` where one is open at the beginning, or has begun by the end:
        the block may then have read old weights and new ones. Scores with gradients run in such a block.
        """
        with reading_weights(lambda: (self.weight_version, self._host.num_writes)) as version:
            yield version

    async def pause(self: _Loading, mode: UpdateMode = "abort") -> None:
        """Run no step until `resume()`; new requests wait. With mode "keep", running ones go on later as they are."""
        check_mode(mode)
        await _carry_out(self, lambda core: core.gate.pause(mode))

    async def resume(self: _Loading) -> None:
        """Let the steps go on after `pause()`."""
        await _carry_out(self, lambda core: core.gate.resume())

    async def sleep(self: _Loading, level: SleepLevel = "all", *, mode: UpdateMode = "abort") -> None:
        """Run no step until `wake()`, and release memory: the K/V "cache", the "weights", or "all".

        Weights are released that can be made again from a live module, or read again from where the engine read them;
        for others, `WeightsError` is raised. Level "discard" is "all", and releases these as well. Cached prefixes are
        lost, except with level "weights". Weights can be updated meanwhile.
        """
        check_mode(mode)
        check_level(level)
        await _carry_out(self, lambda core: core.gate.sleep(level, mode))

    async def wake(self: _Loading) -> None:
        """Take back what `sleep()` released, and read weights again that were not updated meanwhile.

        Raises `OutOfMemory`, and `WeightsError` where weights cannot be read again. Then the engine stays asleep, and
        `wake()` can be repeated.
        """
        await _carry_out(self, lambda core: core.gate.wake())

    async def load_adapter(self: _Loading, name: str, source: object) -> None:
        """Load a LoRA adapter for requests with `adapter=name`, which run in the same steps as all others.

        `source` is a folder that peft wrote, or a live module with peft's layers: its adapter `name`, or its only one.
        The matrices are copied and never merged into the model. A name that is loaded already gets a new generation:
        requests that run keep theirs to their end, new ones find no K/V of earlier ones. Nothing else is disturbed.
        Raises `WeightsError` for what does not fit or is not supported, `EngineStateError` while this name is being
        loaded, `RequestError`, `EngineClosed`.
        """
        name = check_adapter(name)
        await _carry_out(self, lambda core: core.adapters.load(name, source))

    async def unload_adapter(self: _Loading, name: str) -> None:
        """Forget an adapter: new requests for it are refused, those that run go on, and then its memory is freed.

        Raises `RequestError` for a name that is not loaded, `EngineStateError` while it is being loaded.
        """
        name = text("name", name)
        await _carry_out(self, lambda core: core.adapters.unload(name))


def check_adapter(name: str) -> str:
    """The name that an adapter is to have. Raises `RequestError`."""
    if not (name := text("name", name)):
        raise RequestError("an adapter needs a name: '' stands for none")
    return name


@contextmanager
def reading_weights(state: Callable[[], tuple[int, int]]) -> Iterator[int]:
    """`Updates.reading_weights`; `state` gives the weight version, and the number of writes of `Host.num_writes`."""
    version, num_writes = before = state()
    if num_writes % 2:
        raise EngineStateError("the weights are being updated, or an update failed half way: read them after an update")
    yield version
    if state() != before:
        raise EngineStateError(
            f"weights of version {version} were updated while they were read, so the results may mix old and new "
            "ones: compute them again, and let updates wait for them"
        )


async def _carry_out(engine: _Loading, order: Order, *, can_be_cancelled: bool = True) -> None:
    """Have the engine's loop carry out an order. If the caller is cancelled, give up what can be given up."""
    if can_be_cancelled:
        await engine._loaded_soon()
    host, outcome = engine._host, Future[None]()
    host.post(lambda core: core.gate.start(order(core), outcome))
    try:
        await result_of(outcome)
    except BaseException:
        if can_be_cancelled:
            host.try_post(lambda core: core.gate.cancel(outcome))
        raise

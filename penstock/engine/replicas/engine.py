"""`ReplicatedEngine`: several replicas of one model behind one queue, with the interface of one engine.

Owns the lifetime of everything below it. Every method may be called from any thread or event loop. Importing or
constructing it changes no global state.
"""

from __future__ import annotations

import math
import random
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from penstock.api.arguments import check_id, check_priority, read_arguments
from penstock.api.callbacks import Callbacks
from penstock.api.channel import Channel
from penstock.api.exiting import halt_at_exit
from penstock.api.handle import RequestHandle
from penstock.api.log import engine_logger
from penstock.api.prompt import Prompt, read_prompt
from penstock.api.protocols import Callback
from penstock.api.waiting import result_of
from penstock.api.weights import SleepLevel, UpdateMode, WeightSource, check_level, check_mode
from penstock.config import EngineConfig, EngineSettings, with_settings
from penstock.engine.assembly import Parts
from penstock.engine.capabilities import Capabilities
from penstock.engine.observe.metrics import Metrics
from penstock.engine.replicas.dispatcher import Dispatcher
from penstock.engine.replicas.figures import ReplicatedStats, replicated_figures
from penstock.engine.replicas.host import RouterHost
from penstock.engine.replicas.orders import Orders
from penstock.engine.replicas.replica import Replica
from penstock.engine.replicas.sources import Models
from penstock.engine.requests.request import Request, new_request, unused_id
from penstock.engine.requests.room import RoomQueue
from penstock.engine.updates import UpdateBlock, check_adapter, reading_weights
from penstock.errors import ConfigurationError, EngineClosed, shown
from penstock.generation import Params, default_params
from penstock.models.protocol import ModelRunner
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.admission import Admission
from penstock.scheduling.routing import Choice, RoundRobin, by_load, by_prefix
from penstock.values import real, text

CALLBACK_DRAIN_S = 0.5  # for a request whose callback stops the engine
CHOICES: dict[str, Callable[[], Choice]] = {
    "prefix": lambda: by_prefix,
    "load": lambda: by_load,
    "round_robin": RoundRobin,
}
Routing = Literal["prefix", "load", "round_robin"]


class ReplicatedEngine(Capabilities):
    """Serves one model with `replicas` copies of it, in this process, each with threads and a cache of its own.

    `model` is as for `InferenceEngine`, or a list with the model of each replica. Of a live module, the first replica
    borrows it and the others run copies, which follow its updates; of several live modules in a list, the others follow
    the first. `devices` names the device of each replica; without it each gets a GPU, or they share the CPU and its
    cores, and a live module stays where it is. Requests wait in one queue and go to the replica that has computed most
    of their prompt, unless it is busier by far (`routing="prefix"`), to the least loaded one ("load") or to each in
    turn ("round_robin"). Settings are those of `EngineConfig`, for each replica; `max_queue_size` and
    `max_queued_tokens` are for all together. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        model: object = None,
        tokenizer: object = None,
        config: EngineConfig | None = None,
        *,
        replicas: int | None = None,
        devices: Sequence[str] | None = None,
        routing: Routing = "prefix",
        **settings: Unpack[EngineSettings],
    ) -> None:
        if not isinstance(routing, str) or routing not in CHOICES:
            raise ConfigurationError(f"routing={shown(routing)} is unknown: use {', '.join(map(repr, CHOICES))}")
        self.config = config = with_settings(config, settings)
        self._models: Models | None = Models.read(model, tokenizer, config, replicas, devices)
        self._admission, self._metrics = Admission(config), Metrics(config.enable_metrics, config.kept_outputs)
        log = engine_logger(config)
        sources = [self._models.source(number) for number in range(self._models.count)]
        shared = config, self._admission, self._metrics.finished, log
        self._replicas = [Replica(number, source, *shared) for number, source in enumerate(sources)]
        self._dispatcher = Dispatcher(self._replicas, config, self._admission, self._metrics, CHOICES[routing](), log)
        self._host = RouterHost(self._replicas, self._dispatcher)
        self._room = RoomQueue(self._admission, self._host)
        self._orders = Orders(self._dispatcher, self._models.followed)
        self._callbacks = Callbacks(self._host.fail_request)
        self._channels: weakref.WeakValueDictionary[str, Channel] = weakref.WeakValueDictionary()
        self._random = random.Random(config.seed)
        parts = self._host, self._callbacks
        self._finalizer = weakref.finalize(self, _shut_down, *parts, halt_at_exit(*parts))
        self._finalizer.atexit = False  # it would wait for the running steps

    # Generation.

    def generate(
        self, prompt: Prompt, params: Params = None, *, request_id: str | None = None,
        priority: RequestPriority = RequestPriority.NORMAL, deadline: float | None = None,
        ttft_deadline: float | None = None, namespace: str = "", adapter: str = "", callback: Callback | None = None,
    ) -> RequestHandle:  # fmt: skip
        """`InferenceEngine.generate`, on whichever replica the request is routed to.

        Priorities, waiting time and deadlines count in the one queue and, with the same meaning, in the replica.
        """
        arguments = read_arguments(
            *(prompt, params),
            priority=priority,
            deadline=deadline,
            ttft_deadline=ttft_deadline,
            namespace=namespace,
            adapter=adapter,
            callback=callback,
        )
        request = new_request(unused_id(request_id, self._channels), arguments, self._random.getrandbits(62))
        self._submit(request)
        handle = RequestHandle(request.channel, self)
        if callback is not None:
            self._callbacks.stream(handle, callback)
        return handle

    async def wait_for_room(
        self, prompt: Prompt | None = None, *, priority: RequestPriority = RequestPriority.NORMAL
    ) -> None:
        """`InferenceEngine.wait_for_room`, for the one queue."""
        num_tokens = 1 if prompt is None else read_prompt(prompt).estimate_tokens()
        priority = check_priority(priority)
        self._host.start()
        await self._room.wait(num_tokens, priority)

    def abort(self, request_id: str) -> None:
        """End a request with its output so far; unknown and ended ids are ignored. Raises `RequestError`."""
        self._host.abort(check_id(request_id))

    # Lifetime.

    def start(self) -> None:
        """Load all replicas and start serving; blocks until ready. Raises `ConfigurationError`, `OutOfMemory`."""
        self._host.boot().result()

    def stop(self, drain: float = 30.0) -> None:
        """`InferenceEngine.stop`, of all replicas: serve accepted requests for `drain` seconds, abort the rest."""
        drain = real("drain", drain, 0.0, math.inf, "seconds, a number >= 0")
        if self._callbacks.current_request() is not None:
            drain = min(drain, CALLBACK_DRAIN_S)
        self._host.stop(drain)
        self._models = None  # a live module belongs to its owner alone from here on
        self._orders.release_models()
        self._finalizer()

    async def aclose(self, drain: float = 30.0) -> None:
        """`stop` without blocking the event loop. Cancelling it ends the drain and aborts all requests at once."""
        from anyio import to_thread  # imported here, because few programs close an engine before they exit

        try:
            await to_thread.run_sync(self.stop, drain, abandon_on_cancel=True)
        except BaseException:  # cancelled by asyncio or trio
            self._host.call(self._dispatcher.close_all)
            raise

    async def __aenter__(self) -> Self:
        try:
            await self._loaded_soon()
        except BaseException:  # nobody will call `__aexit__`
            self._finalizer()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose(30.0 if error is None else 0.0)

    # Weights.

    @property
    def weight_version(self) -> int:
        """The version of the weights, which is the same on all replicas: how often they were updated."""
        serving = [replica for replica in self._replicas if replica.is_live] or self._replicas
        return serving[0].weight_version

    def updating(self, mode: UpdateMode = "abort", *, stale_kv: bool = False) -> UpdateBlock:
        """`InferenceEngine.updating`: at the end of the block, copies take over the weights of the live module."""
        check_mode(mode, stale_kv)
        orders = self._orders
        return UpdateBlock(
            lambda: self._order(lambda: orders.begin_update(mode), undo=orders.abandon_update),
            lambda: self._order(lambda: orders.end_update(stale_kv), can_be_cancelled=False),
        )

    async def update_weights(
        self, source: WeightSource = None, *, mode: UpdateMode = "abort", stale_kv: bool = False
    ) -> int:
        """`InferenceEngine.update_weights`, on all replicas: no step of any runs until all of them have the weights.

        A folder is read once. An iterator is read to its end before anything is written, because every replica needs
        its tensors. If some replicas could write and others could not, `WeightsError.is_mixed` is true, and the engine
        refuses everything from then on.
        """
        check_mode(mode, stale_kv)
        await self._order(lambda: self._orders.update(source, mode, stale_kv))
        return self.weight_version

    async def pause(self, mode: UpdateMode = "abort") -> None:
        """Run no step until `resume()`; new requests wait. With mode "keep", running ones go on later as they are."""
        check_mode(mode)
        await self._order(lambda: self._orders.pause(mode))

    async def resume(self) -> None:
        """Let the steps go on after `pause()`."""
        await self._order(self._orders.resume)

    async def sleep(self, level: SleepLevel = "all", *, mode: UpdateMode = "abort") -> None:
        """`InferenceEngine.sleep`, of all replicas."""
        check_mode(mode)
        check_level(level)
        await self._order(lambda: self._orders.sleep(level, mode))

    async def wake(self) -> None:
        """Take back what `sleep()` released. Raises as that of `InferenceEngine`; then all replicas stay asleep."""
        await self._order(self._orders.wake)

    def reading_weights(self) -> AbstractContextManager[int]:
        """`InferenceEngine.reading_weights`, of the replica that runs the live module, or of the first one."""
        return reading_weights(lambda: (self.weight_version, self._host.num_writes))

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        lead = self._lead
        return [] if lead is None else lead.inputs.adapters.names()

    def adapter_generation(self, name: str) -> int:
        """`InferenceEngine.adapter_generation`, of the first replica that serves."""
        lead = self._lead
        return 0 if lead is None else lead.inputs.adapters.generation(name)

    async def load_adapter(self, name: str, source: object) -> None:
        """`InferenceEngine.load_adapter`, on all replicas; if some cannot, it is loaded on none afterwards."""
        name = check_adapter(name)
        await self._order(lambda: self._orders.load_adapter(name, source))

    async def unload_adapter(self, name: str) -> None:
        """`InferenceEngine.unload_adapter`, on all replicas."""
        name = text("name", name)
        await self._order(lambda: self._orders.unload_adapter(name))

    # Facts and memory.

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, which two threads must not use at once; None before loading, or if skipped."""
        lead = self._lead
        return None if lead is None else lead.tokenizer

    def default_params(self, max_tokens: int | None = None) -> SamplingParams:
        """`InferenceEngine.default_params`. Loads the model."""
        self.start()
        return default_params(self._loaded.runner.spec.defaults, max_tokens or self.config.default_max_tokens)

    def get_stats(self) -> ReplicatedStats:
        """The statistics of all replicas together, and of each."""
        return replicated_figures(self._replicas, self._host, self._dispatcher, self._admission, self._metrics)

    def reset_prefix_cache(self) -> None:
        """Reuse no K/V computed so far, on any replica."""
        for replica in self._replicas:
            replica.host.try_post(lambda core: core.housekeeper.reset_cache())
        self._host.call(partial(self._dispatcher.forget_prefixes, of_running=True))

    @property
    def _lead(self) -> Parts | None:
        """The parts of the first replica that serves; None before they are loaded and after their end."""
        if not self._host.booted.done():
            return None
        return next((replica.parts for replica in self._replicas if replica.is_live), None)

    @property
    def _loaded(self) -> Parts:
        if (lead := self._lead) is None:
            raise EngineClosed("the engine was stopped, or all of its replicas have failed: create a new one")
        return lead

    async def _loaded_soon(self) -> Parts:
        """Wait for all replicas without blocking the loop."""
        await result_of(self._host.boot())
        return self._loaded

    async def _trained_runner(self) -> ModelRunner:
        """The runner of the live module, on whose parameters gradients go."""
        lead = await self._loaded_soon()
        if self._models is None or self._models.owner is None:
            return lead.runner
        number = self._models.models.index(self._models.owner)
        if not self._replicas[number].is_live:
            raise EngineClosed(f"replica {number}, which runs the live module, has failed: create a new engine")
        return self._replicas[number].parts.runner

    async def _order(
        self,
        order: Callable[[], Coroutine[object, object, None]],
        *,
        undo: Callable[[], Coroutine[object, object, None]] | None = None,
        can_be_cancelled: bool = True,
    ) -> None:
        """`RouterHost.carry_out`, once the model is loaded."""
        if can_be_cancelled:
            await self._loaded_soon()
        await self._host.carry_out(order, undo, can_be_cancelled=can_be_cancelled)

    def _submit(self, request: Request) -> None:
        self._host.start()
        displaced = self._admission.reserve([request.place])
        try:
            self._host.submit(request, displaced)
        except BaseException:
            self._admission.release(request.place)
            raise
        self._channels[request.id] = request.channel


def _shut_down(host: RouterHost, callbacks: Callbacks, unregister: Callable[[], None]) -> None:
    """Stop at once, on a thread of its own where an engine was dropped: the caller's may be one that is joined."""
    if host.is_closed or not host.is_started:
        _stop(host, callbacks, unregister)
    else:
        threading.Thread(target=_stop, args=(host, callbacks, unregister), name="penstock-end", daemon=True).start()


def _stop(host: RouterHost, callbacks: Callbacks, unregister: Callable[[], None]) -> None:
    host.stop(0.0)
    callbacks.close()
    unregister()

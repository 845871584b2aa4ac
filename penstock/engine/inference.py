"""`InferenceEngine`: the native engine, used from within a program.

Owns the lifetime of everything below it: configuration, the host's threads, admission, callbacks. Every method may be
called from any thread or event loop. Importing or constructing it changes no global state.
"""

from __future__ import annotations

import math
import os
import random
import weakref
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from types import TracebackType
from typing import Any, Self, Unpack

from penstock.api.arguments import RequestOptions, check_id, check_priority, read_arguments
from penstock.api.callbacks import Callbacks
from penstock.api.channel import Channel, RequestStatus
from penstock.api.exiting import halt_at_exit
from penstock.api.handle import RequestHandle
from penstock.api.inference_request import FinalCallback, InferenceRequest, Submission
from penstock.api.log import engine_logger
from penstock.api.prompt import Prompt, read_prompt
from penstock.api.protocols import Callback
from penstock.api.stats import EngineStats
from penstock.config import EngineConfig, EngineSettings, with_settings
from penstock.engine.assembly import Assembly, Parts, check_model, check_tokenizer, shut_down
from penstock.engine.capabilities import Capabilities
from penstock.engine.loop.host import Host
from penstock.engine.loop.memory import NOTHING_FREED, optimize_memory
from penstock.engine.observe.figures import figures
from penstock.engine.observe.metrics import Metrics
from penstock.engine.requests.forking import Fork, check_num_forks, forkable
from penstock.engine.requests.request import Request, new_request, unused_id
from penstock.engine.requests.room import RoomQueue
from penstock.engine.updates import Updates
from penstock.errors import EngineClosed
from penstock.generation import Params, default_params
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.admission import Admission
from penstock.scheduling.advisor import BatchingOptimizer
from penstock.values import real

# Number of ended requests from `submit_request` that can still be queried.
KEPT_REQUESTS = 1024
CALLBACK_DRAIN_S = 0.5  # for a request whose callback stops the engine


class InferenceEngine(Capabilities, Updates):
    """Serves one model to many callers at once.

    `model` is a hub id, a folder, a live `nn.Module` (borrowed: it is not modified and stays trainable), a
    `ScriptedModel`, or None for the small model that ships with the package. Settings are passed as an `EngineConfig`
    or as keywords. `start()`, `async with` or the first request loads the model. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        model: object = None,
        tokenizer: object = None,
        config: EngineConfig | None = None,
        **settings: Unpack[EngineSettings],
    ) -> None:
        self.config = with_settings(config, settings)
        check_model(model)
        check_tokenizer(tokenizer)
        self._log = engine_logger(self.config)
        self._metrics = Metrics(self.config.enable_metrics, self.config.kept_outputs)
        self._admission = Admission(self.config)
        self._channels: weakref.WeakValueDictionary[str, Channel] = weakref.WeakValueDictionary()
        self._kept: deque[Channel] = deque(maxlen=KEPT_REQUESTS)
        self._random = random.Random(self.config.seed)
        self._pid = os.getpid()
        self._advisor = BatchingOptimizer()
        self._assembly = Assembly(
            *(model, tokenizer, self.config, self._admission, self._metrics, self._advisor, self._log)
        )
        self._host = Host(self._assembly.boot)
        self._callbacks = Callbacks(self._host.fail_request)
        self._room = RoomQueue(self._admission, self._host)
        parts = self._host, self._callbacks, self._assembly
        self._finalizer = weakref.finalize(self, shut_down, *parts, halt_at_exit(*parts))
        self._finalizer.atexit = False  # it would wait for the running step

    # Generation.

    def generate(
        self, prompt: Prompt, params: Params = None, *, request_id: str | None = None,
        priority: RequestPriority = RequestPriority.NORMAL, deadline: float | None = None,
        ttft_deadline: float | None = None, namespace: str = "", adapter: str = "", callback: Callback | None = None,
    ) -> RequestHandle:  # fmt: skip
        """Submit a request at once, from any thread or event loop; await the handle, or iterate over it.

        `prompt` is a string, token ids, chat messages, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or
        `{"messages": [...]}` with arguments of the chat template. `params` default to the model's generation config.
        `deadline` and `ttft_deadline` (first token) are seconds from now, effective once the model is loaded. Requests
        share cached prefixes only within a `namespace`. `adapter` is the name of a loaded one. `callback(delta)`, sync
        or async, receives every delta. Raises `RequestError`, `EngineOverloaded`, `EngineClosed`; the handle raises
        `RequestTooLarge` and later errors.
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
        self._submit([request])
        handle = RequestHandle(request.channel, self)
        if callback is not None:
            self._callbacks.stream(handle, callback)
        return handle

    def submit_request(
        self,
        text: Prompt,
        generation_config: Params = None,
        priority: RequestPriority = RequestPriority.NORMAL,
        callback: FinalCallback | None = None,
        metadata: Mapping[str, object] | None = None,
        *,
        config: Params = None,
        **options: Unpack[RequestOptions],
    ) -> str:
        """Submit a request and return its id; `callback(request)` is called once, when it has ended for any reason.

        `get_request_status(id)` and `get_request(id)` know the last thousand of these requests. `config` is an alias of
        `generation_config`; `options` are those of `generate`; the callback's `InferenceRequest` has the `metadata`.
        """
        params = config if generation_config is None else generation_config
        submission = Submission(params, priority, callback, metadata)
        handle = self.generate(text, params, priority=priority, **options).detach()
        self._kept.append(self._channels[handle.request_id])
        if callback is not None:
            self._callbacks.finish(handle, lambda output: callback(submission.ended(output, handle.status)))
        return handle.request_id

    async def submit_request_async(
        self,
        text: Prompt,
        generation_config: Params = None,
        priority: RequestPriority = RequestPriority.NORMAL,
        metadata: Mapping[str, object] | None = None,
        *,
        config: Params = None,
        **options: Unpack[RequestOptions],
    ) -> InferenceRequest:
        """`submit_request` that waits for the result; `result.output_ids[0]` is prompt and output."""
        params = config if generation_config is None else generation_config
        submission = Submission(params, priority, metadata=metadata)
        handle = self.generate(text, params, priority=priority, **options)
        return submission.ended(await handle, handle.status)

    async def wait_for_room(
        self, prompt: Prompt | None = None, *, priority: RequestPriority = RequestPriority.NORMAL
    ) -> None:
        """Wait until `generate(prompt, priority=priority)` finds room in the queue; then call it, without an await.

        The longest waiting of the highest class goes first; one that can displace a lower class does not wait. Nothing
        is reserved: if another thread is faster, `generate` raises `EngineOverloaded`; wait again. The prompt matters
        only with `max_queued_tokens`. Raises `RequestError`, `EngineClosed`.
        """
        num_tokens = 1 if prompt is None else read_prompt(prompt).estimate_tokens()
        priority = check_priority(priority)
        self._boot()
        await self._room.wait(num_tokens, priority)

    def fork(
        self,
        request_id: str,
        n: int = 1,
        params: Params = None,
        *,
        append: SequenceOf[int] = (),
        at: int | None = None,
        index: int = 0,
    ) -> list[RequestHandle]:
        """`RequestHandle.fork` for a request given by its id."""
        request_id = check_id(request_id)
        ids = [unused_id(None, self._channels) for _ in range(check_num_forks(n, self.config.max_queue_size))]
        fork = Fork(request_id, index=index, at=at, append=append)
        requests = fork.new_requests(ids, forkable(self._channels.get(request_id), request_id), params)
        self._submit(requests, fork)
        return [RequestHandle(request.channel, self) for request in requests]

    def abort(self, request_id: str) -> None:
        """End a request with its output so far; unknown and ended ids are ignored. Raises `RequestError`."""
        request_id = check_id(request_id)
        self._host.try_post(lambda core: core.abort(request_id))

    def get_request_status(self, request_id: str) -> RequestStatus | None:
        """The state of a request; None for an unknown id. Raises `RequestError`."""
        channel = self._channels.get(check_id(request_id))
        return None if channel is None else channel.status

    def get_request(self, request_id: str) -> RequestHandle | None:
        """Another handle of a known request; dropping it does not abort. Raises `RequestError`."""
        channel = self._channels.get(check_id(request_id))
        return None if channel is None else RequestHandle(channel, self).detach()

    # Lifetime.

    def start(self) -> None:
        """Load the model and start serving; blocks until ready. Raises `ConfigurationError`, `OutOfMemory`."""
        self._boot()
        self._host.wait_ready()

    def stop(self, drain: float = 30.0) -> None:
        """Serve accepted requests for at most `drain` seconds, abort the rest, free all resources. Idempotent.

        Waits for a running step and for a loading model. It blocks the thread: in a coroutine, use `await
        engine.aclose()`, or `async with`, which drains as well unless an exception leaves it. Called from a callback,
        it waits for no callback, and for at most half a second for that callback's own request, which receives no
        deltas in that time.
        """
        drain = real("drain", drain, 0.0, math.inf, "seconds, a number >= 0")
        if (calling_request := self._callbacks.current_request()) is not None:
            self._host.try_post(lambda core: core.close_after(min(drain, CALLBACK_DRAIN_S), calling_request))
        self._host.stop(drain)
        self._finalizer()

    async def aclose(self, drain: float = 30.0) -> None:
        """`stop` without blocking the event loop. Cancelling it ends the drain and aborts all requests at once."""
        from anyio import to_thread  # imported here, because few programs close an engine before they exit

        try:
            await to_thread.run_sync(self.stop, drain, abandon_on_cancel=True)
        except BaseException:  # cancelled by asyncio or trio
            self._host.try_post(lambda core: core.close_all())
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

    @property
    def weight_version(self) -> int:
        """The version of the weights that steps run with: 0 at first, and one more after every update.

        A borrowed module whose adapters, hooks or submodules were changed outside of an update counts as updated. A
        stopped engine has the last one.
        """
        return self._assembly.weight_version

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        return [] if self._assembly.parts is None else self._assembly.parts.inputs.adapters.names()

    def adapter_generation(self, name: str) -> int:
        """A number that is new with every load of an adapter of this name; 0 while none is loaded."""
        return 0 if self._assembly.parts is None else self._assembly.parts.inputs.adapters.generation(name)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, which two threads must not use at once; None before loading, or if skipped."""
        return None if self._assembly.parts is None else self._assembly.parts.tokenizer

    def default_params(self, max_tokens: int | None = None) -> SamplingParams:
        """The parameters of a request without any: the model's own generation defaults. Loads the model.

        Their `max_length` and `min_length` depend on the prompt and are omitted. `max_tokens` applies if they have no
        `max_new_tokens`; None is the configured `default_max_tokens`.
        """
        self.start()
        return default_params(self._loaded.runner.spec.defaults, max_tokens or self.config.default_max_tokens)

    # Statistics and memory.

    def get_stats(self) -> EngineStats:
        """Status, queue, cache, latency percentiles and rates, memory, configuration, loaded model."""
        parts = None if self._host.closed else self._assembly.parts
        return figures(self.config, self._host, self._admission, self._metrics, parts, self.weight_version)

    @property
    def batching_optimizer(self) -> BatchingOptimizer:
        """The advisor that records every step, for `get_recommendations()`; empty with enable_metrics=False."""
        return self._advisor

    def reset_prefix_cache(self) -> None:
        """Reuse no K/V computed so far, for instance after changing weights outside of `updating`.

        Running requests keep their K/V; whatever they add from now on is not shared with new requests.
        """
        self._host.try_post(lambda core: core.housekeeper.reset_cache())

    def optimize_memory(self) -> dict[str, float]:
        """Release all memory that no running request needs.

        Returns `freed_bytes`, and the memory use `before` and `after`, from 0 to 1. Releases garbage, kept workspaces,
        memory held by allocators, cached prefixes (also in `swap_space`) and, on a CPU, the memory of every block that
        is then empty, including a draft model's. Waits for the running step; in a coroutine, use `await
        asyncio.to_thread(engine.optimize_memory)`. Does nothing if the engine is not loaded.
        """
        return optimize_memory(self._host, self._loaded.runner) if self._host.ready else dict(NOTHING_FREED)

    @property
    def _loaded(self) -> Parts:
        if self._assembly.parts is None:
            raise EngineClosed("the engine was stopped: create a new one")
        return self._assembly.parts

    async def _loaded_soon(self) -> Parts:
        """Wait for the model without blocking the loop."""
        self._boot()
        await self._host.wait_boot_ended()
        self._host.wait_ready()
        return self._loaded

    def _boot(self) -> None:
        if self._pid != os.getpid():
            raise EngineClosed("this engine was created before os.fork(): create a new one in the child process")
        self._host.start()

    def _submit(self, requests: SequenceOf[Request], fork: Fork | None = None) -> None:
        """Pass all requests to the engine's thread, or none."""
        self._boot()
        places = [request.place for request in requests]
        displaced = self._admission.reserve(places)
        try:
            self._host.post(lambda core: core.submit(requests, displaced, fork), requests)
        except BaseException:
            self._admission.release(*places)
            raise
        for request in requests:
            self._channels[request.id] = request.channel

"""`Generation`: the engine's requests of one API call, one per prompt, from admission to their ends.

Neutral of any API: endpoints give prompts and parameters and receive deltas or outputs. `submit` returns once the
engine has accepted every prompt, so that refusals still have a status of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.api.protocols import Engine, WithAdapters
from penstock.errors import RequestTooLarge
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import RequestPriority, SamplingParams
from penstock.serving.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """What a call gives the engine besides prompts and parameters."""

    priority: RequestPriority = RequestPriority.NORMAL
    deadline: float | None = None
    namespace: str = ""
    adapter: str = ""


class Generation:
    """Open requests. Iterate over `deltas()`, or await `outputs()`; `cancel()` ends all of them."""

    def __init__(self, handles: Sequence[RequestHandle], metrics: Metrics) -> None:
        self.handles = handles
        self.ended: list[RequestOutput] = []  # results that were read
        self._metrics = metrics
        self._num_tokens = 0
        self._last_token_s = 0.0

    def cancel(self) -> None:
        """End every request that still runs."""
        for handle in self.handles:
            handle.cancel()

    async def outputs(self) -> list[RequestOutput]:
        """The results in the order of the prompts. Raises the first error, after which nothing runs on."""
        try:
            outputs = [await handle for handle in self.handles]
        except BaseException:
            self.cancel()
            raise
        for output in outputs:
            self._record(output)
            self._metrics.record_mean_gap(output)
        return outputs

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(number of the prompt, delta) as they arrive. Raises the first error, after which nothing runs on."""
        try:
            if len(self.handles) == 1:
                async for delta in self.handles[0]:
                    self._count(delta)
                    yield 0, delta
            else:
                async for number, delta in _merge(self.handles):
                    self._count(delta)
                    yield number, delta
            for handle in self.handles:
                self._record(await handle)
        finally:
            self.cancel()

    def usage(self) -> Usage:
        """The tokens of a stream so far."""
        return Usage(sum(len(handle.prompt_token_ids) for handle in self.handles), self._num_tokens)

    async def final_usage(self) -> Usage:
        """The tokens of a stream that has ended."""
        return usage_of([await handle for handle in self.handles])

    def _record(self, output: RequestOutput) -> None:
        self.ended.append(output)
        self._metrics.record_output(output)

    def _count(self, delta: Delta) -> None:
        if count := len(delta.token_ids):
            self._num_tokens += count
            now, previous = time.monotonic(), self._last_token_s
            if previous:
                self._metrics.inter_token.observe((now - previous) / count, count)
            self._last_token_s = now


async def submit(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    options: Options,
    name: str,
    cancels: ExitStack,
    metrics: Metrics,
) -> list[RequestHandle]:
    """Submit every prompt under the id `name`, numbered if there are several; wait until all are accepted.

    A `max_tokens` that does not fit is cut to what fits. Raises the first refusal. Whoever closes `cancels`, during the
    wait or after it, cancels every request.
    """
    generate = _generate_of(engine, options)
    ids = [name] if len(prompts) == 1 else [f"{name}-{number}" for number in range(len(prompts))]

    def start(prompt: Prompt, request_id: str, params: SamplingParams) -> RequestHandle:
        handle = generate(prompt, params, request_id=request_id)
        cancels.callback(handle.cancel)
        return handle

    handles = [start(prompt, request_id, params) for prompt, request_id in zip(prompts, ids, strict=True)]
    for number, handle in enumerate(handles):
        try:
            await handle.admitted()
        except RequestTooLarge:
            if params.max_tokens is None:
                raise
            metrics.record_cut()
            handles[number] = start(_encoded(handle, prompts[number]), ids[number], replace(params, max_tokens=None))
            await handles[number].admitted()
    return handles


def _generate_of(engine: Engine, options: Options) -> Callable[..., RequestHandle]:
    generate: Callable[..., RequestHandle] = engine.generate
    if options.adapter and isinstance(engine, WithAdapters):
        generate = partial(engine.generate, adapter=options.adapter)
    return partial(generate, priority=options.priority, deadline=options.deadline, namespace=options.namespace)


def _encoded(handle: RequestHandle, prompt: Prompt) -> Prompt:
    """The prompt of a refused request as the engine has encoded it, if it has: that need not be done twice."""
    ids = handle.prompt_token_ids
    return {"prompt": handle.prompt, "prompt_token_ids": ids} if ids else prompt


def usage_of(outputs: Sequence[RequestOutput]) -> Usage:
    """The tokens of results."""
    return Usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(completion.token_ids) for output in outputs for completion in output.outputs),
        sum(output.num_cached_tokens for output in outputs),
    )


async def _merge(handles: Sequence[RequestHandle]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of several requests in the order of their arrival; each request waits for its reader."""
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(1)

    async def pump(number: int, handle: RequestHandle) -> None:
        try:
            async for delta in handle:
                await queue.put((number, delta))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(number, handle)) for number, handle in enumerate(handles)]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()

"""`HostedEngine`: an engine of another package that runs for this program and takes token ids.

Owns what such engines share: prompts encoded on this side, parameters that fit behind them, scores through the log
probabilities of a prompt, weights. A subclass starts its engine and reads one stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from penstock.api.arguments import Arguments, read_arguments
from penstock.api.channel import Channel
from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt, as_batch, read_prompt
from penstock.api.protocols import WithAdapters
from penstock.api.waiting import call_on_loop, result_of
from penstock.api.weights import UpdateMode
from penstock.backends.encoding import Encoder
from penstock.backends.hosted_order import HostedOrder
from penstock.backends.hosted_weights import HostedWeights
from penstock.backends.prompt_scores import Scoring
from penstock.backends.request_params import NEW_TOKENS
from penstock.backends.streamed import StreamedEngine, StreamedRequest
from penstock.errors import EngineClosed, RequestError
from penstock.generation import LengthLimit, Params, default_params, fitted
from penstock.sampling import RequestPriority, SamplingParams, resolved
from penstock.scores import Score

T = TypeVar("T")
Completion = str | Sequence[int]  # a text without special tokens, or token ids


@dataclass(slots=True, eq=False)
class HostedWork:
    """What is particular to a request: a completion that is scored, and the ids of the engine's own streams."""

    scoring: Scoring | None = None
    stream_ids: list[str] = field(default_factory=list)


class HostedEngine(StreamedEngine[HostedWork]):
    """The part of an engine that does not depend on which package it is."""

    limit_name: ClassVar[str]  # the option that limits the length of a sequence

    def __init__(self, name: str, model: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(name, loop)
        self.model = model
        self._encoder: Encoder | None = None
        self._weights: HostedWeights | None = None

    # What a subclass does; all of it once the engine is open, but what concerns scores.

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer, which two threads must not use at once; None before the engine has started."""

    @property
    @abstractmethod
    def _limit(self) -> int:
        """The most tokens of prompt and output together."""

    @property
    @abstractmethod
    def _defaults(self) -> Mapping[str, Any]:
        """The model's own parameters."""

    @abstractmethod
    def _check_logits(self) -> None:
        """Raise `RequestError` if this engine returns no logits."""

    @abstractmethod
    def _new_scoring(self, ids: Sequence[int], params: Params, rows: bool, entropies: bool) -> Scoring:
        """A completion to score. Raises `RequestError`."""

    @abstractmethod
    async def _forget_prefixes(self) -> None:
        """Reuse nothing computed so far."""

    @abstractmethod
    async def _generate(self, request: StreamedRequest[HostedWork], ids: list[int], params: SamplingParams) -> None:
        """Read the engine's streams for these token ids into the transcripts of a request."""

    # Capabilities beside `generate`.

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt. Raises `RequestError`."""
        read = read_prompt(prompt)
        return (await self._run(lambda: self._encoding().encode(read, add_special_tokens)))[1]

    async def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. Raises `RequestError`."""
        return await self._run(lambda: self._encoding().decode(ids, skip_special_tokens))

    def default_params(self, max_tokens: int | None = None) -> SamplingParams:
        """The parameters of a request without any. Starts the engine."""
        self.start()
        return default_params(self._defaults, max_tokens or NEW_TOKENS)

    def reset_prefix_cache(self) -> None:
        """Reuse nothing computed so far; blocks until the engine has forgotten it."""
        self.start()
        with self._lock:
            loop = self._loop()
        asyncio.run_coroutine_threadsafe(self._forget_prefixes(), loop).result()

    async def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: Completion | Sequence[Completion],
        *,
        params: Params = None,
        logits: bool = False,
        entropies: bool = False,
        namespace: str = "",
        adapter: str = "",
        priority: RequestPriority = RequestPriority.NORMAL,
        deadline: float | None = None,
    ) -> list[Score]:
        """The log probabilities of a completion after each prompt. Of `params` only the temperature may be set.

        Raises `RequestError`, also for what this engine cannot return, and whatever awaiting a request raises.
        """
        if logits:
            self._check_logits()
        if adapter and not isinstance(self, WithAdapters):
            raise RequestError(f"this engine serves no adapters: leave out adapter={adapter!r}")
        options: dict[str, Any] = {"namespace": namespace, "adapter": adapter}
        options |= {"priority": priority, "deadline": deadline}
        return await self._score(prompts, completions, params, logits, entropies, **options)

    async def _score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: Completion | Sequence[Completion],
        params: Params,
        rows: bool,
        entropies: bool,
        **options: Any,
    ) -> list[Score]:
        """`score`; with `rows`, what the engine reports of the whole vocabulary is in `logits`, whatever it is."""
        batch, completed = as_batch(prompts), as_batch(completions)
        if len(batch) != len(completed):
            raise RequestError(f"{len(batch)} prompts and {len(completed)} completions: pass one for each")
        arguments = [read_arguments(prompt, params, **options) for prompt in batch]
        ids = [await self._completion_ids(completion) for completion in completed]
        scored = arguments[0].params if arguments else None
        works = [HostedWork(self._new_scoring(tokens, scored, rows, entropies)) for tokens in ids]
        handles = [self._submit_work(*pair) for pair in zip(arguments, works, strict=True)]
        for handle in handles:
            await handle
        return [work.scoring.score() for work in works if work.scoring is not None]

    async def _completion_ids(self, completion: Any) -> Sequence[int]:
        return await self.tokenize(completion, add_special_tokens=False) if isinstance(completion, str) else completion

    def _submit_work(self, arguments: Arguments, work: HostedWork) -> RequestHandle:
        channel = Channel(f"score-{id(work):x}", arguments.priority, arguments.deadline)
        self._submit(StreamedRequest(channel, arguments, work))
        return RequestHandle(channel, self)

    # Weights.

    @property
    def weight_version(self) -> int:
        """How often the weights were updated."""
        return 0 if self._weights is None else self._weights.version

    async def pause(self, mode: UpdateMode = "abort") -> None:
        """Start no more requests. "abort" ends what runs, "wait" serves it first, "keep" leaves it for later.

        Raises `EngineStateError` if the engine is paused already, and while it is paused, resumed or updated by others.
        A caller who is cancelled leaves the engine running.
        """
        await self._order(lambda order: self._opened_weights().pause(mode, order))

    async def resume(self) -> None:
        """Go on after `pause`. Raises `EngineStateError` if the engine is not paused, and where `pause` does."""
        await self._run(lambda: self._opened_weights().resume())

    async def update_weights(self, source: object, *, mode: UpdateMode = "abort") -> int:
        """Load the weights in a folder of safetensors, and return their version; K/V of older weights is not reused.

        `mode` says what happens to running requests: "abort" ends them, "wait" serves them first, "keep" lets them go
        on with K/V that are computed anew, where the engine can; otherwise it is refused. Raises `WeightsError` for
        weights that do not fit: nothing was changed then, unless it has `is_mixed`. If the caller is cancelled, an
        update that waits for requests, or for another one, is given up; one that is being loaded goes on to its end.
        """
        return await self._order(lambda order: self._opened_weights().update(source, mode, order))

    def _opened_weights(self) -> HostedWeights:
        assert self._weights is not None, "the engine has not started"
        return self._weights

    def _encoding(self) -> Encoder:
        assert self._encoder is not None, "the engine has not started"
        return self._encoder

    async def _order(self, function: Callable[[HostedOrder], Awaitable[T]]) -> T:
        """`_run`, of a function that is told if the caller leaves."""
        order = HostedOrder()
        try:
            return await self._run(lambda: function(order))
        except BaseException:
            with self._lock, contextlib.suppress(EngineClosed):
                call_on_loop(self._loop(), order.leave)
            raise

    async def _run(self, function: Callable[[], Awaitable[T]]) -> T:
        """The result of a coroutine on the engine's loop, for a caller on any loop."""

        async def run() -> T:
            await self._opened()
            return await function()

        with self._lock:
            loop = self._loop()
        try:
            return await result_of(asyncio.run_coroutine_threadsafe(run(), loop))
        except CancelledError:  # of the future, by the end of the loop; that of a caller is another class
            raise EngineClosed("the engine was stopped") from None

    # Requests.

    async def _stream(self, request: StreamedRequest[HostedWork]) -> None:
        channel, arguments, scoring = request.channel, request.arguments, request.work.scoring
        channel.prompt, channel.prompt_token_ids = await self._encoding().encode(arguments.prompt)
        ids = channel.prompt_token_ids
        if scoring is None:
            await self._generate(request, ids, self._fitted(arguments.params, len(ids)))
        else:
            await self._generate(request, *scoring.request(ids))

    def _fitted(self, params: Params, prompt_len: int) -> SamplingParams:
        """The parameters with a `max_tokens` that fits. Raises `RequestError`."""
        limit = LengthLimit(self._limit, self.limit_name)
        return resolved(*fitted(params, prompt_len, limit, self._defaults, NEW_TOKENS), ())


async def to_the_end(function: Callable[..., T], *arguments: object) -> T:
    """The result of a function on a thread, also where the caller is cancelled: whatever it starts has to be ended."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()

"""`OpenAIEngine`: an OpenAI-compatible server behind the `Engine` protocol.

Owns one event loop thread, on which it reads the streams of all requests. Deadlines are kept here, because the API has
none; cancelling a request closes its connection, which aborts it on the server.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import openai

from penstock.api.arguments import Arguments, check_id, read_arguments
from penstock.api.callbacks import Callbacks
from penstock.api.channel import Channel, RequestStatus
from penstock.api.event_loop import LoopThread
from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.api.protocols import Callback
from penstock.api.transcript import Transcript
from penstock.api.waiting import Wakeups, call_on_loop
from penstock.backends.addresses import api_url
from penstock.backends.openai_errors import penstock_error
from penstock.backends.openai_request import Body, request_body
from penstock.errors import (
    ConfigurationError,
    DeadlineExceeded,
    EngineClosed,
    ExecutionError,
    PenstockError,
    RequestAborted,
    RequestError,
    described,
)
from penstock.generation import Params
from penstock.outputs import RequestMetrics, RequestOutput
from penstock.sampling import RequestPriority

CONNECT_S = 10.0
_STATUSES: dict[type, RequestStatus] = {type(None): RequestStatus.COMPLETED, RequestAborted: RequestStatus.CANCELLED}
_REASONS: dict[type, str] = {RequestAborted: "abort", EngineClosed: "abort", DeadlineExceeded: "deadline"}


@dataclass(slots=True, eq=False)
class _Request:
    """One request. Everything below `arguments` is written on the loop's thread."""

    channel: Channel
    arguments: Arguments
    body: Body
    transcripts: dict[int, Transcript] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    error: PenstockError | None = None  # set by whoever ends the request early
    first_token: float | None = None


class OpenAIEngine:
    """Generates on the server at `url` (with or without /v1), with its first model unless `model` names another.

    `max_retries` repeats a request that the server refused with 408, 409, 429 or 5xx, or that did not reach it, after a
    growing, randomized pause; never after its first token. With `return_token_ids` the server is asked for token ids,
    which Penstock and vLLM return; without them the outputs hold text only. Priority is not sent. A namespace is sent
    as `cache_salt`. `start` raises `ConfigurationError` if the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        max_retries: int = 2,
        return_token_ids: bool = False,
    ) -> None:
        self.url = api_url(url)
        self.model = model
        self._api_key = api_key
        self._max_retries = max_retries
        self._return_token_ids = return_token_ids
        self._callbacks = Callbacks(self._fail)
        self._requests: dict[str, _Request] = {}
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self._client: openai.AsyncOpenAI | None = None
        self._connecting = asyncio.Lock()
        self._is_closed = False
        self._num_ended = 0

    def start(self) -> None:
        """Connect, and find the model. Raises `EngineClosed`, or `ConfigurationError`; the engine is then stopped."""
        with self._lock:
            if self._is_closed:
                raise EngineClosed("the engine was stopped")
            if self._thread is None:
                self._thread = LoopThread("penstock-openai")
            loop = self._thread.loop
        try:
            asyncio.run_coroutine_threadsafe(self._connect(), loop).result()
        except BaseException:
            self.stop(drain=0.0)  # leaves no thread behind
            raise

    async def _connect(self) -> openai.AsyncOpenAI:
        async with self._connecting:
            if self._client is None:
                self._client = await self._new_client()
        return self._client

    async def _new_client(self) -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._api_key or "none",
            max_retries=self._max_retries,
            timeout=openai.Timeout(None, connect=CONNECT_S),
        )
        if self.model is None:
            try:
                self.model = (await client.models.list()).data[0].id
            except (openai.OpenAIError, LookupError) as error:
                await client.close()
                raise ConfigurationError(f"no model can be found at {self.url}: {described(error)}") from None
        return client

    def generate(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        request_id: str | None = None,
        priority: RequestPriority = RequestPriority.NORMAL,
        deadline: float | None = None,
        ttft_deadline: float | None = None,
        namespace: str = "",
        callback: Callback | None = None,
    ) -> RequestHandle:
        """See `Engine.generate`. Raises `RequestError` for parameters that the API cannot express."""
        arguments = read_arguments(
            prompt,
            params,
            priority=priority,
            deadline=deadline,
            ttft_deadline=ttft_deadline,
            namespace=namespace,
            callback=callback,
        )
        request_id, body = check_id(request_id), request_body(arguments.prompt, arguments.params)
        channel = Channel(request_id, arguments.priority, arguments.deadline)
        channel.prompt, channel.prompt_token_ids = arguments.prompt.text, arguments.prompt.token_ids or []
        request = _Request(channel, arguments, body)
        self._submit(request_id, request)
        handle = RequestHandle(channel, self)
        if callback is not None:
            self._callbacks.stream(handle, callback)
        return handle

    def _submit(self, request_id: str, request: _Request) -> None:
        with self._lock:
            if self._is_closed:
                raise EngineClosed("the engine was stopped")
            if request_id in self._requests:
                raise RequestError(f"request id {request_id!r} is already running: choose another, or none")
            if self._thread is None:
                self._thread = LoopThread("penstock-openai")
            self._requests[request_id] = request
            call_on_loop(self._thread.loop, self._launch, request)

    def _launch(self, request: _Request) -> None:
        request.task = asyncio.get_running_loop().create_task(self._serve(request))
        # Not in the task itself: one that is cancelled before its first step never runs.
        request.task.add_done_callback(lambda task: self._end(request))

    def abort(self, request_id: str) -> None:
        """End a request; unknown and ended ids are ignored."""
        self._fail(request_id, RequestAborted(f"request {request_id} was aborted"))

    def _fail(self, request_id: str, error: BaseException) -> None:
        with self._lock:
            request, thread = self._requests.get(request_id), self._thread
        if request is not None and thread is not None:
            fault = error if isinstance(error, PenstockError) else RequestError(f"callback failed: {described(error)}")
            call_on_loop(thread.loop, self._cancel, request, fault)

    def _cancel(self, request: _Request, error: PenstockError) -> None:
        if request.error is None and not request.channel.ended and request.task is not None:
            request.error = error
            request.task.cancel()

    async def _serve(self, request: _Request) -> None:
        """Run one request, and keep the error that ended it."""
        try:
            await self._stream_until_deadline(request)
        except BaseException as error:
            if request.error is None:
                request.error = penstock_error(error, self.url)

    async def _stream_until_deadline(self, request: _Request) -> None:
        first = min(request.arguments.deadline, request.arguments.ttft_deadline)
        limit = asyncio.timeout_at(None if math.isinf(first) else first)  # loops count in seconds of `time.monotonic`
        try:
            async with limit:
                client = await self._connect()
                async with await self._open_stream(client, request) as stream:
                    async for chunk in stream:
                        if self._publish(request, chunk) and request.first_token is None:
                            request.first_token = time.monotonic()
                            deadline = request.arguments.deadline
                            limit.reschedule(None if math.isinf(deadline) else deadline)
        except TimeoutError:
            if limit.expired():
                raise DeadlineExceeded(f"request {request.channel.request_id} passed its deadline") from None
            raise
        ended = [item for item in request.transcripts.values() if item.finish_reason is not None]
        if len(ended) < request.body.get("n", 1):
            raise ExecutionError(f"{self.url} ended a stream without a finish reason")

    async def _open_stream(self, client: openai.AsyncOpenAI, request: _Request) -> Any:
        """The stream of chunks; chat and text completions have chunks of different types."""
        body, extensions = dict(request.body), dict(request.body["extra_body"])
        if self._return_token_ids:
            extensions["return_token_ids"] = True
        if request.arguments.namespace:
            extensions["cache_salt"] = request.arguments.namespace
        body |= {"model": self.model, "stream": True, "extra_body": extensions}
        endpoint: Any = client.completions if "prompt" in body else client.chat.completions
        return await endpoint.create(**body)

    def _publish(self, request: _Request, chunk: Any) -> bool:
        """Pass a chunk on to the readers; whether it held text or tokens."""
        wakeups, has_tokens = Wakeups(), False
        for choice in chunk.choices:
            ids = getattr(choice, "prompt_token_ids", None) or getattr(chunk, "prompt_token_ids", None)
            if ids and not request.channel.prompt_token_ids:
                request.channel.prompt_token_ids = list(ids)
            transcript = request.transcripts.get(choice.index)
            if transcript is None:
                transcript = request.transcripts[choice.index] = Transcript(request.channel.request_id, choice.index)
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            tokens = getattr(choice, "token_ids", None) or []
            transcript.add(text or "", tokens)
            if choice.finish_reason is not None:
                transcript.end("", choice.finish_reason, getattr(choice, "stop_reason", None))
            if text or tokens or choice.finish_reason is not None:
                request.channel.put(transcript, wakeups)
                has_tokens = True
        wakeups.send()
        return has_tokens

    def _end(self, request: _Request) -> None:
        channel, error, wakeups = request.channel, request.error, Wakeups()
        transcripts = [request.transcripts[index] for index in sorted(request.transcripts)]
        for transcript in transcripts or [Transcript(channel.request_id)]:
            if error is not None and transcript.finish_reason is None:
                transcript.end("", _REASONS.get(type(error), "error"))
                channel.put(transcript, wakeups)
        completions = [transcript.completion() for transcript in transcripts]
        arrival, first = request.arguments.arrival, request.first_token
        metrics = RequestMetrics(None, None if first is None else first - arrival, time.monotonic() - arrival)
        output = RequestOutput(
            channel.request_id, channel.prompt, channel.prompt_token_ids, completions, error is None, metrics=metrics
        )
        if isinstance(error, RequestAborted | DeadlineExceeded | EngineClosed):
            error.output = output
        with self._lock:
            del self._requests[channel.request_id]
            self._num_ended += 1
        channel.end(_STATUSES.get(type(error), RequestStatus.FAILED), output, error, wakeups)
        wakeups.send()

    def stop(self, drain: float = 30.0) -> None:
        """Wait for running requests for at most `drain` seconds, abort the others, and close the connections."""
        with self._lock:
            was_closed, self._is_closed, thread = self._is_closed, True, self._thread
        if thread is not None and not was_closed:
            asyncio.run_coroutine_threadsafe(self._close(drain), thread.loop).result()
            self._callbacks.close()
            thread.close(wait=self._callbacks.current_request() is None)

    async def _close(self, drain: float) -> None:
        with self._lock:
            requests = list(self._requests.values())
        tasks = [request.task for request in requests if request.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, drain))
        for request in requests:
            self._cancel(request, EngineClosed("the engine was stopped"))
        if tasks:
            await asyncio.wait(tasks)
        if self._client is not None:
            await self._client.close()

    def get_stats(self) -> dict[str, object]:
        """The address, the model, and how many requests run and have ended."""
        with self._lock:
            return {"url": self.url, "model": self.model, "running": len(self._requests), "ended": self._num_ended}

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop, 0.0 if kind else 30.0)

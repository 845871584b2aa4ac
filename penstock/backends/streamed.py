"""`StreamedEngine`: what every engine behind the `Engine` protocol does that reads a stream of outputs per request.

Owns one event loop thread, on which it reads the streams of all requests, and their handles, channels, transcripts and
deadlines. A subclass opens the connection to its engine and reads one stream. Imports nothing of the native engine.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

from penstock.api.arguments import Arguments, check_id, read_arguments
from penstock.api.callbacks import Callbacks
from penstock.api.channel import Channel, RequestStatus
from penstock.api.event_loop import LoopThread
from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.api.protocols import Callback, WithAdapters
from penstock.api.transcript import Transcript
from penstock.api.waiting import Wakeups, call_on_loop
from penstock.errors import (
    DeadlineExceeded,
    EngineClosed,
    ExecutionError,
    PenstockError,
    RequestAborted,
    RequestError,
    described,
)
from penstock.generation import Params
from penstock.outputs import Logprob, RequestMetrics, RequestOutput
from penstock.sampling import RequestPriority

W = TypeVar("W")
_STATUSES: dict[type, RequestStatus] = {type(None): RequestStatus.COMPLETED, RequestAborted: RequestStatus.CANCELLED}
_REASONS: dict[type, str] = {RequestAborted: "abort", EngineClosed: "abort", DeadlineExceeded: "deadline"}


@dataclass(slots=True, eq=False)
class StreamedRequest(Generic[W]):
    """One request. `work` is what the subclass made of its arguments. All below it is written on the loop's thread."""

    channel: Channel
    arguments: Arguments
    work: W
    num_completions: int = 1
    transcripts: dict[int, Transcript] = field(default_factory=dict)
    prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    error: PenstockError | None = None  # set by whoever ends the request early
    first_token: float | None = None

    def transcript(self, index: int) -> Transcript:
        """The transcript of a completion, made when it is first asked for."""
        if index not in self.transcripts:
            self.transcripts[index] = Transcript(self.channel.request_id, index)
        return self.transcripts[index]

    def output(self) -> RequestOutput:
        """The result so far."""
        channel, arrival, first = self.channel, self.arguments.arrival, self.first_token
        return RequestOutput(
            channel.request_id,
            channel.prompt,
            channel.prompt_token_ids,
            [self.transcripts[index].completion() for index in sorted(self.transcripts)],
            self.error is None,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            metrics=RequestMetrics(None, None if first is None else first - arrival, time.monotonic() - arrival),
        )


class StreamedEngine(ABC, Generic[W]):
    """The part of an engine between its callers and the streams it reads.

    Without `loop` the engine runs an event loop of its own, on a thread called `name`, until `stop`. A given loop runs
    on another thread, belongs to the caller, and must outlive the engine.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._name = name
        self._given_loop = loop
        self._callbacks = Callbacks(self._fail)
        self._requests: dict[str, StreamedRequest[W]] = {}
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self._opening: asyncio.Task[None] | None = None  # shared by all that wait for the connection
        self._has_ended = False
        self._is_closed = False
        self._num_ended = 0

    # What a subclass does. All but `_prepare` is called on the loop's thread.

    @abstractmethod
    def _prepare(self, arguments: Arguments) -> tuple[W, int]:
        """What to send, and the number of completions; called by `generate`. Raises `RequestError`."""

    @abstractmethod
    async def _open(self) -> None:
        """Connect to the engine, before the first stream; cancelled by `stop`. Raises a `PenstockError`."""

    @abstractmethod
    async def _close(self) -> None:
        """Free what `_open` took, all of it or, where it failed, some; no stream is being read."""

    @abstractmethod
    async def _stream(self, request: StreamedRequest[W]) -> None:
        """Read the stream of one request into its transcripts, with `_publish` for every part of it."""

    @abstractmethod
    def _error_of(self, error: BaseException) -> PenstockError:
        """The error to raise for one of the engine's own."""

    def _interrupt(self, request: StreamedRequest[W], task: asyncio.Task[None]) -> None:
        """End a stream that has been given an error; cancelling its task unless overridden."""
        task.cancel()

    # Starting.

    def start(self) -> None:
        """Connect to the engine. Raises `EngineClosed`, or `ConfigurationError`; the engine is then stopped."""
        with self._lock:
            loop = self._loop()
        try:
            asyncio.run_coroutine_threadsafe(self._opened(), loop).result()
        except BaseException:
            self.stop(drain=0.0)  # leaves no thread behind
            raise

    def _loop(self) -> asyncio.AbstractEventLoop:
        """The loop; the caller holds the lock. Raises `EngineClosed`."""
        if self._is_closed:
            raise EngineClosed("the engine was stopped")
        if self._given_loop is not None:
            return self._given_loop
        if self._thread is None:
            self._thread = LoopThread(self._name)
        return self._thread.loop

    async def _opened(self) -> None:
        """Wait for the connection, which is made once: whoever leaves meanwhile ends it for nobody.

        After a failure the next caller tries again.
        """
        if self._has_ended:
            raise EngineClosed("the engine was stopped")
        if self._opening is None or _has_failed(self._opening):
            self._opening = asyncio.ensure_future(self._connect())
        opening = self._opening
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled():
                raise EngineClosed("the engine was stopped") from None
            raise

    async def _connect(self) -> None:
        """Open the connection; what a failed or cancelled attempt took is freed."""
        try:
            await self._open()
        except BaseException:
            await self._close()
            raise

    # Submitting.

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
        adapter: str = "",
        callback: Callback | None = None,
    ) -> RequestHandle:
        """See `Engine.generate`. Raises `RequestError` for parameters, or an adapter, that the engine does not have."""
        arguments = read_arguments(
            prompt,
            params,
            priority=priority,
            deadline=deadline,
            ttft_deadline=ttft_deadline,
            namespace=namespace,
            adapter=adapter,
            callback=callback,
        )
        if arguments.adapter and not isinstance(self, WithAdapters):
            raise RequestError(f"this engine serves no adapters: leave out adapter={arguments.adapter!r}")
        request_id, (work, num_completions) = check_id(request_id), self._prepare(arguments)
        channel = Channel(request_id, arguments.priority, arguments.deadline)
        channel.prompt, channel.prompt_token_ids = arguments.prompt.text, arguments.prompt.token_ids or []
        self._submit(StreamedRequest(channel, arguments, work, num_completions))
        handle = RequestHandle(channel, self)
        if callback is not None:
            self._callbacks.stream(handle, callback)
        return handle

    def _submit(self, request: StreamedRequest[W]) -> None:
        request_id = request.channel.request_id
        with self._lock:
            loop = self._loop()
            if request_id in self._requests:
                raise RequestError(f"request id {request_id!r} is already running: choose another, or none")
            self._requests[request_id] = request
            call_on_loop(loop, self._launch, request)

    def _launch(self, request: StreamedRequest[W]) -> None:
        request.task = asyncio.get_running_loop().create_task(self._serve(request))
        # Not in the task itself: one that is cancelled before its first step never runs.
        request.task.add_done_callback(lambda task: self._end(request))
        self._set_timer(request, min(request.arguments.deadline, request.arguments.ttft_deadline))

    async def _serve(self, request: StreamedRequest[W]) -> None:
        """Run one request, and keep the error that ended it."""
        try:
            await self._opened()
            await self._stream(request)
            ended = [transcript for transcript in request.transcripts.values() if transcript.finish_reason is not None]
            if len(ended) < request.num_completions:
                raise ExecutionError(f"{self._name} ended a stream without a finish reason")
        except asyncio.CancelledError:
            request.error = request.error or EngineClosed("the engine was stopped")
        except PenstockError as error:
            request.error = request.error or error
        except BaseException as error:
            request.error = request.error or self._error_of(error)

    def _publish(self, request: StreamedRequest[W], transcripts: Sequence[Transcript]) -> None:
        """Pass on what was added to transcripts. The first call ends the time for the first token."""
        wakeups = Wakeups()
        for transcript in transcripts:
            request.channel.put(transcript, wakeups)
        wakeups.send()
        if transcripts and request.first_token is None:
            request.first_token = time.monotonic()
            self._set_timer(request, request.arguments.deadline)

    # Ending.

    def _set_timer(self, request: StreamedRequest[W], deadline: float) -> None:
        if request.timer is not None:
            request.timer.cancel()
        if request.error is None and not math.isinf(deadline):
            error = DeadlineExceeded(f"request {request.channel.request_id} passed its deadline")
            delay = deadline - time.monotonic()
            request.timer = asyncio.get_running_loop().call_later(delay, self._cancel, request, error)

    def abort(self, request_id: str) -> None:
        """End a request; unknown and ended ids are ignored."""
        self._fail(request_id, RequestAborted(f"request {request_id} was aborted"))

    def _fail(self, request_id: str, error: BaseException) -> None:
        with self._lock:
            request, thread = self._requests.get(request_id), self._thread
            loop = self._given_loop if thread is None else thread.loop
        if request is not None and loop is not None:
            fault = error if isinstance(error, PenstockError) else RequestError(f"callback failed: {described(error)}")
            call_on_loop(loop, self._cancel, request, fault)

    def _cancel(self, request: StreamedRequest[W], error: PenstockError) -> None:
        if request.error is None and request.task is not None and not request.task.done():
            request.error = error
            self._interrupt(request, request.task)

    def _end(self, request: StreamedRequest[W]) -> None:
        channel, error, wakeups = request.channel, request.error, Wakeups()
        if request.timer is not None:
            request.timer.cancel()
        for transcript in map(request.transcript, range(request.num_completions)):
            if error is not None and transcript.finish_reason is None:
                transcript.end("", _REASONS.get(type(error), "error"))
                channel.put(transcript, wakeups)
        output = request.output()
        if isinstance(error, RequestAborted | DeadlineExceeded | EngineClosed):
            error.output = output
        with self._lock:
            del self._requests[channel.request_id]
            self._num_ended += 1
        channel.end(_STATUSES.get(type(error), RequestStatus.FAILED), output, error, wakeups)
        wakeups.send()

    def stop(self, drain: float = 30.0) -> None:
        """Wait for running requests for at most `drain` seconds, abort the others, and free all resources."""
        with self._lock:
            was_closed, self._is_closed, thread = self._is_closed, True, self._thread
            loop = self._given_loop if thread is None else thread.loop
        if was_closed or loop is None:
            return
        asyncio.run_coroutine_threadsafe(self._drain(drain), loop).result()
        self._callbacks.close()
        if thread is not None:
            thread.close(wait=self._callbacks.current_request() is None)

    async def _drain(self, seconds: float) -> None:
        with self._lock:
            requests = list(self._requests.values())
        tasks = [request.task for request in requests if request.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, seconds))
        for request in requests:
            self._cancel(request, EngineClosed("the engine was stopped"))
        if tasks:
            await asyncio.wait(tasks)
        self._has_ended = True
        if self._opening is not None:
            self._opening.cancel()  # unless it is open
            await asyncio.wait([self._opening])
            if not _has_failed(self._opening):
                await self._close()

    def get_stats(self) -> dict[str, object]:
        """How many requests run and have ended."""
        with self._lock:
            return {"running": len(self._requests), "ended": self._num_ended}

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self.start)
        except BaseException:  # `__aexit__` is not called; a cancelled caller leaves a start that goes on
            await asyncio.to_thread(self.stop, 0.0)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop, 0.0 if kind else 30.0)


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)

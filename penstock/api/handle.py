"""`RequestHandle`: a running request. Await it for the result, iterate over it for the deltas.

Owns the lifetime of the request: cancelling an await or closing the handle aborts the request, and so does dropping
the last reference to a handle that was not detached. Works on any thread and any event loop of asyncio or trio. Waits
on the request's `Channel` and never blocks the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

from penstock.api.channel import Channel, RequestStatus
from penstock.errors import RequestError
from penstock.generation import Params
from penstock.outputs import Delta, RequestOutput


class Owner(Protocol):
    """The engine that runs the request and finds it by id."""

    def abort(self, request_id: str) -> None:
        """End the request; unknown and ended ids are ignored."""
        ...


@runtime_checkable
class Forking(Protocol):
    """An engine whose requests can be forked."""

    def fork(
        self, request_id: str, n: int, params: Params, *, append: Sequence[int], at: int | None, index: int
    ) -> list[RequestHandle]:
        """Start `n` requests that continue from the current state of this one."""
        ...


class RequestHandle(Coroutine[object, None, RequestOutput]):
    """One request.

    `await handle` returns the final `RequestOutput`. `async for delta in handle` yields `Delta`s as they arrive, merged
    when the reader is slow. Both raise `RequestAborted`, `DeadlineExceeded` (with the partial output) or the request's
    own error; an iteration first yields a last delta with the corresponding `finish_reason`. After `break`, the request
    is aborted when the handle is dropped or closed.

    A handle is also a coroutine: `create_task(handle)`, `TaskGroup.create_task(handle)` and anyio's or trio's
    `start_soon(engine.generate, prompt)` await it in a task of their own.
    """

    def __init__(self, channel: Channel, engine: Owner) -> None:
        self._channel = channel
        self._engine = engine
        self._detached = False
        self._awaits: dict[object, Coroutine[object, None, RequestOutput]] = {}  # by the task that runs it

    @property
    def request_id(self) -> str:
        """The id of the request, as given or generated."""
        return self._channel.request_id

    @property
    def status(self) -> RequestStatus:
        """The current state of the request."""
        return self._channel.status

    @property
    def prompt(self) -> str | None:
        """The prompt text, once known; None for token ids."""
        return self._channel.prompt

    @property
    def prompt_token_ids(self) -> list[int]:
        """The token ids of the prompt, once known."""
        return self._channel.prompt_token_ids

    async def admitted(self) -> None:
        """Wait until the engine has encoded and checked the prompt and the parameters.

        Raises the error of a request that was refused, such as `RequestTooLarge`. Cancelling the wait does not abort
        the request.
        """
        await self._channel.wait_admitted()

    def cancel(self) -> None:
        """Abort the request; awaiting it then raises `RequestAborted`. Does nothing once it has ended."""
        if not self._channel.ended:
            self._engine.abort(self.request_id)

    def fork(
        self, n: int = 1, params: Params = None, *, append: Sequence[int] = (), at: int | None = None, index: int = 0
    ) -> list[RequestHandle]:
        """Start `n` requests, from any thread or event loop, that continue from what this one has generated.

        The forks share its K/V up to that point, copied on write, and sample independently; this request continues too.
        The generated tokens, followed by the token ids in `append`, count as the prompt of a fork, so its outputs hold
        only what is new. `at` branches after that many tokens of completion `index` instead of after the newest.
        Without `params`, a fork uses this request's parameters with the remainder of its `max_tokens`. Namespace,
        priority and deadline are inherited. Raises `RequestError` if this request has ended or has no tokens yet,
        `EngineOverloaded` and `EngineClosed`. Errors that the engine finds later are raised by the forks: a beam search
        cannot be forked, or the request has ended in the meantime.
        """
        if not isinstance(self._engine, Forking):
            raise RequestError("this engine cannot fork requests: submit the prompt and its output as a new request")
        return self._engine.fork(self.request_id, n, params, append=append, at=at, index=index)

    def detach(self) -> RequestHandle:
        """Keep the request running when this handle is dropped."""
        self._detached = True
        return self

    def done(self) -> bool:
        """Whether the request has ended."""
        return self._channel.ended

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Block this thread until the final output; in a coroutine, await the handle instead.

        Raises `TimeoutError` after `timeout` seconds, and whatever awaiting would raise.
        """
        return self._channel.wait_blocking(timeout)

    def __await__(self) -> Generator[object, None, RequestOutput]:
        return self._wait().__await__()

    async def _wait(self) -> RequestOutput:
        try:
            return await self._channel.wait()
        except BaseException:  # the request's own error, or a cancellation by asyncio or trio
            self.cancel()
            raise

    def send(self, value: None, /) -> object:
        """Run the handle as a coroutine; called by event loops."""
        task = _current_task()
        if task not in self._awaits:
            self._awaits[task] = self._wait()
        return self._step(task, lambda coroutine: coroutine.send(value))

    def throw(  # type: ignore[override]  # event loops use the one-argument form
        self, error: BaseException, /
    ) -> object:
        """Raise an error at the point where the current task awaits the handle; called by event loops."""
        task = _current_task()
        if task not in self._awaits:
            self.cancel()
            raise error
        return self._step(task, lambda coroutine: coroutine.throw(error))

    def close(self) -> None:
        """Abort the request if it still runs."""
        self.cancel()

    def _step(self, task: object, step: Callable[[Coroutine[object, None, RequestOutput]], object]) -> object:
        try:
            return step(self._awaits[task])
        except BaseException:  # the coroutine has ended, normally with `StopIteration`
            del self._awaits[task]
            raise

    def __aiter__(self) -> RequestHandle:
        return self

    async def __anext__(self) -> Delta:
        try:
            delta = await self._channel.take()
        except BaseException:
            self.cancel()
            raise
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """Abort the request if it still runs, like closing an async generator."""
        self.cancel()

    async def __aenter__(self) -> RequestHandle:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not self._detached:
            self.cancel()

    def __repr__(self) -> str:
        return f"<RequestHandle {self.request_id} {self.status.value}>"


def _current_task() -> object:
    """The running asyncio task; None on other event loops, which run a coroutine in one task only."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None

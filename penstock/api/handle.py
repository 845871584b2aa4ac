"""`RequestHandle`: a running request in the caller's hand. Await it for the result, iterate it for the deltas.

Owns the request's life: cancelling an await, closing it, or dropping the last reference aborts the request, unless it
was detached. Works from any thread and any event loop, asyncio's or trio's; waits on the request's `Channel` and never
blocks the engine.
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
    """The engine that runs a request, and knows it by its id."""

    def abort(self, request_id: str) -> None:
        """End the request; unknown and ended ids are ignored."""
        ...


@runtime_checkable
class Forking(Protocol):
    """An engine whose requests can be forked."""

    def fork(
        self, request_id: str, n: int, params: Params, *, append: Sequence[int], at: int | None, index: int
    ) -> list[RequestHandle]:
        """Begin requests that continue from where this one is."""
        ...


class RequestHandle(Coroutine[object, None, RequestOutput]):
    """One request.

    `await handle` gives the final `RequestOutput`; `async for delta in handle` gives `Delta`s as they come, merged
    when the reader is slow. Both raise `RequestAborted`, `DeadlineExceeded` (with the partial output) or the
    request's own error; an iteration does so after a last delta whose `finish_reason` says the same. Leaving an
    iteration with `break` aborts the request once the handle itself is dropped or closed.

    It is a coroutine too, so that `create_task(handle)`, `TaskGroup.create_task(handle)` and anyio's or trio's
    `start_soon(engine.generate, prompt)` await it in a task of its own.
    """

    def __init__(self, channel: Channel, engine: Owner) -> None:
        self._channel = channel
        self._engine = engine
        self._detached = False
        self._awaits: dict[object, Coroutine[object, None, RequestOutput]] = {}  # by the task that drives it

    @property
    def request_id(self) -> str:
        """The request's id, given or drawn."""
        return self._channel.request_id

    @property
    def status(self) -> RequestStatus:
        """How far the request has come."""
        return self._channel.status

    @property
    def prompt(self) -> str | None:
        """The prompt's text, once known; None for token ids."""
        return self._channel.prompt

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's token ids, once known."""
        return self._channel.prompt_token_ids

    def cancel(self) -> None:
        """Abort the request; awaiting it then raises `RequestAborted`. Harmless when it has ended."""
        if not self._channel.ended:
            self._engine.abort(self.request_id)

    def fork(
        self, n: int = 1, params: Params = None, *, append: Sequence[int] = (), at: int | None = None, index: int = 0
    ) -> list[RequestHandle]:
        """Begin `n` requests at once, from any thread or loop, that go on from what this one has generated so far.

        Each shares the K/V until then, copied on write, and draws by itself from there on; this request goes on too.
        What was generated counts as prompt of a fork, followed by the token ids of `append`, so that its outputs are
        what is new. `at` branches off after that many tokens of completion `index` instead of after its newest.
        Without `params` a fork has this request's, and what is left of its `max_tokens`. Namespace, priority and
        deadline are inherited. Raises `RequestError` if this request has ended or has no tokens yet, `EngineOverloaded`
        and `EngineClosed`; what the engine finds only later (a beam search cannot be forked, it has ended meanwhile),
        the forks raise.
        """
        if not isinstance(self._engine, Forking):
            raise RequestError("this engine cannot fork requests: submit the prompt and its output as a new one")
        return self._engine.fork(self.request_id, n, params, append=append, at=at, index=index)

    def detach(self) -> RequestHandle:
        """Let the request live on when this handle is dropped."""
        self._detached = True
        return self

    def done(self) -> bool:
        """Whether the request has ended."""
        return self._channel.ended

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Block this thread for the final output; in a coroutine, await the handle instead.

        Raises `TimeoutError` after `timeout` seconds, and what awaiting would raise.
        """
        return self._channel.wait_blocking(timeout)

    def __await__(self) -> Generator[object, None, RequestOutput]:
        return self._wait().__await__()

    async def _wait(self) -> RequestOutput:
        try:
            return await self._channel.wait()
        except BaseException:  # the request's own error, or a cancellation, by whichever event loop
            self.cancel()
            raise

    def send(self, value: None, /) -> object:
        """Drive the handle as a coroutine; for event loops."""
        task = _current_task()
        if task not in self._awaits:
            self._awaits[task] = self._wait()
        return self._step(task, lambda coroutine: coroutine.send(value))

    def throw(  # type: ignore[override]  # the one-argument form is enough for every event loop
        self, error: BaseException, /
    ) -> object:
        """Raise an error where the driving task awaits; for event loops."""
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
        except BaseException:  # its end, of which a `StopIteration` is the regular one
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
        """Abort the request if it still runs, as closing an async generator would."""
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
    """The asyncio task that runs now; None for any other event loop, which drives a coroutine from one task only."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None

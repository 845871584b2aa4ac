"""`Futures`: requests that were accepted and are not answered yet, and answers until they have been read.

The SDK asks for an answer with a request of its own, which waits (a long poll), and asks again if its response was
lost. Runs on the server's loop only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass

from pydantic_core import to_json

from penstock.errors import EngineClosed, EngineOverloaded, PenstockError, RequestAborted, RequestError, described
from penstock.serving.errors import HttpError, failure_of
from penstock.serving.logs import access_logger
from penstock.serving.tinker.kept_answers import KeptAnswers
from penstock.serving.tinker.shares import Places

JSON = "application/json"
PROTOBUF = "application/x-protobuf"


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of a response."""

    body: bytes
    media_type: str = JSON

    @classmethod
    def of(cls, **fields: object) -> Answer:
        """A JSON object."""
        return cls(to_json(fields))


Work = Coroutine[object, object, Answer]


@dataclass(frozen=True, slots=True, eq=False)
class _Future:
    session_id: str
    owner: str
    task: asyncio.Task[Answer]
    can_be_cancelled: bool


class Futures:
    """Futures by request id, which the caller makes so that a request sent twice is one.

    At most `max_pending` are under way, and answers of at most `max_bytes` are kept.
    """

    def __init__(self, max_pending: int, max_bytes: int) -> None:
        self._places = Places("requests are under way", max_pending, "engine_overloaded", retry_after_s=1)
        self._max_bytes = max_bytes
        self._futures: dict[str, _Future] = {}
        self._num_pending: Counter[str] = Counter()  # by owner
        self._kept = KeptAnswers(max_bytes)
        self._log = access_logger()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._futures

    def check_room(self, owner: str) -> None:
        """Raise a 429, which the SDK obeys by waiting, where too many requests are under way."""
        self._places.check(owner, self._num_pending[owner], self._num_pending.total())

    def start(
        self, request_id: str, session_id: str, owner: str, work: Work, *, can_be_cancelled: bool = False
    ) -> None:
        """Run `work`, whose errors are answers too; `can_be_cancelled` by its client if nothing else depends on it."""
        task = asyncio.create_task(self._answer(request_id, work), name=f"tinker {request_id}")
        self._futures[request_id] = _Future(session_id, owner, task, can_be_cancelled)
        self._num_pending[owner] += 1
        task.add_done_callback(lambda task: self._note_done(request_id, owner, task))

    async def wait(self, request_id: str, owner: str, timeout_s: float) -> Answer | None:
        """The answer, or None where there is none yet."""
        future = self._futures.get(request_id)
        if future is None or future.owner != owner:
            text = f"the request {request_id} is not known: its session ended, its answer was read, or it was dropped"
            return failure(HttpError(404, f"{text} because too much was unread"))
        await asyncio.wait({future.task}, timeout=timeout_s)
        if not future.task.done():
            return None
        self._drop(self._kept.read(request_id, owner))
        if future.task.cancelled():
            return failure(RequestAborted("the request was cancelled"))
        return future.task.result()

    def cancel(self, request_id: str, owner: str) -> None:
        """End the work of a request; ids that are unknown, or of work that cannot be cancelled, are ignored."""
        future = self._futures.get(request_id)
        if future is not None and future.owner == owner and future.can_be_cancelled:
            future.task.cancel()

    def is_busy(self, session_id: str) -> bool:
        """Whether work of a session is under way."""
        return any(future.session_id == session_id and not future.task.done() for future in self._futures.values())

    def drop(self, session_id: str) -> None:
        """End all work of a session and forget it."""
        for request_id, future in list(self._futures.items()):
            if future.session_id == session_id:
                future.task.cancel()
                del self._futures[request_id]
                self._kept.discard(request_id, future.owner)

    def _note_done(self, request_id: str, owner: str, task: asyncio.Task[Answer]) -> None:
        self._num_pending[owner] -= 1
        if not self._num_pending[owner]:
            del self._num_pending[owner]
        if request_id in self._futures:
            size = 0 if task.cancelled() else len(task.result().body)
            self._drop(self._kept.add(request_id, owner, size))

    def _drop(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            del self._futures[request_id]

    async def _answer(self, request_id: str, work: Work) -> Answer:
        try:
            answer = await work
            if len(answer.body) > self._max_bytes:
                size = len(answer.body)
                raise RequestError(f"the answer has {size} bytes, and {self._max_bytes} are kept: ask for less")
            return answer
        except Exception as error:
            if not isinstance(error, PenstockError):
                self._log.error("tinker request failed", request_id=request_id, error=described(error), exc_info=True)
            return failure(error)


def failure(error: Exception) -> Answer:
    """An answer that says why there is none. The SDK raises it as a `RequestFailedError`."""
    status = failure_of(error).status
    is_server = status >= 500 or isinstance(error, EngineOverloaded | EngineClosed)
    return Answer.of(error=failure_of(error).message, category="server" if is_server else "user")

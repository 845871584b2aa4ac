"""`Futures`: requests that were accepted and are not answered yet, and answers until they have been read.

The SDK asks for an answer with a request of its own, which waits (a long poll), and asks again if its response was
lost. Runs on the server's loop only.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass

from pydantic_core import to_json

from penstock.errors import EngineClosed, EngineOverloaded, PenstockError, RequestAborted, described
from penstock.serving.errors import HttpError, failure_of
from penstock.serving.logs import access_logger

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
MAX_READ = 512  # answers that were read and may have been lost
MAX_UNREAD = 1 << 14  # answers that nobody has asked for yet; the oldest are dropped first


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

    At most `max_pending` are under way.
    """

    def __init__(self, max_pending: int) -> None:
        self._max_pending = max_pending
        self._futures: dict[str, _Future] = {}
        self._num_pending = 0
        self._unread: OrderedDict[str, None] = OrderedDict()
        self._read: OrderedDict[str, None] = OrderedDict()
        self._log = access_logger()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._futures

    def check_room(self) -> None:
        """Raise a 429, which the SDK obeys by waiting, where too many requests are under way."""
        if self._num_pending >= self._max_pending:
            text = f"{self._num_pending} requests are under way, this server's limit: wait for one of them"
            raise HttpError(429, text, code="engine_overloaded", retry_after_s=1)

    def start(
        self, request_id: str, session_id: str, owner: str, work: Work, *, can_be_cancelled: bool = False
    ) -> None:
        """Run `work`, whose errors are answers too; `can_be_cancelled` by its client if nothing else depends on it."""
        task = asyncio.create_task(self._answer(request_id, work), name=f"tinker {request_id}")
        self._futures[request_id] = _Future(session_id, owner, task, can_be_cancelled)
        self._num_pending += 1
        task.add_done_callback(lambda _: self._note_done(request_id))

    async def wait(self, request_id: str, owner: str, timeout_s: float) -> Answer | None:
        """The answer, or None where there is none yet."""
        future = self._futures.get(request_id)
        if future is None or future.owner != owner:
            return failure(HttpError(404, f"the request {request_id} is not known: its session ended, or it was read"))
        await asyncio.wait({future.task}, timeout=timeout_s)
        if not future.task.done():
            return None
        self._note_read(request_id)
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
                for answered in (self._unread, self._read):
                    answered.pop(request_id, None)

    def _note_done(self, request_id: str) -> None:
        self._num_pending -= 1
        if request_id in self._futures:
            self._unread[request_id] = None
            self._keep_newest(self._unread, MAX_UNREAD)

    def _note_read(self, request_id: str) -> None:
        self._unread.pop(request_id, None)
        self._read[request_id] = None
        self._read.move_to_end(request_id)
        self._keep_newest(self._read, MAX_READ)

    def _keep_newest(self, answered: OrderedDict[str, None], limit: int) -> None:
        while len(answered) > limit:
            self._futures.pop(answered.popitem(last=False)[0], None)

    async def _answer(self, request_id: str, work: Work) -> Answer:
        try:
            return await work
        except Exception as error:
            if not isinstance(error, PenstockError):
                self._log.error("tinker request failed", request_id=request_id, error=described(error), exc_info=True)
            return failure(error)


def failure(error: Exception) -> Answer:
    """An answer that says why there is none. The SDK raises it as a `RequestFailedError`."""
    status = failure_of(error).status
    is_server = status >= 500 or isinstance(error, EngineOverloaded | EngineClosed)
    return Answer.of(error=failure_of(error).message, category="server" if is_server else "user")

"""`Registry`: makes the requests of an engine, submits them, and knows them by id.

Owns ids and the seeds of requests that bring none. A request is known while somebody holds its channel. Called on
callers' threads.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Sequence

from penstock.api.arguments import Arguments, check_id
from penstock.api.channel import Channel
from penstock.engine.loop.host import Host
from penstock.engine.requests.forking import Fork
from penstock.engine.requests.request import Request, new_request
from penstock.errors import RequestError
from penstock.scheduling.admission import Admission

# Number of ended requests from `submit_request` that can still be queried.
KEPT_REQUESTS = 1024


class Registry:
    """`seed` determines the seeds of the requests; None: they are different in every process."""

    def __init__(self, admission: Admission, host: Host, seed: int | None) -> None:
        self._admission = admission
        self._host = host
        self._channels: weakref.WeakValueDictionary[str, Channel] = weakref.WeakValueDictionary()
        self._kept: deque[Channel] = deque(maxlen=KEPT_REQUESTS)
        self._random = random.Random(seed)

    def new_request(self, request_id: str | None, arguments: Arguments) -> Request:
        """A request that arrives now. Raises `RequestError` while its id is in use."""
        return new_request(self.unused_id(request_id), arguments, self._random.getrandbits(62))

    def unused_id(self, request_id: str | None) -> str:
        """The id, or a fresh one for None. Raises `RequestError` while it is in use."""
        request_id = check_id(request_id)
        if (channel := self._channels.get(request_id)) is not None and not channel.ended:
            raise RequestError(f"request id {request_id!r} is already running: use another, or none")
        return request_id

    def submit(self, requests: Sequence[Request], fork: Fork | None = None) -> None:
        """Pass all requests to the engine's thread, or none. Raises `EngineOverloaded`, `EngineClosed`."""
        places = [request.place for request in requests]
        displaced = self._admission.reserve(places)
        try:
            self._host.post(lambda core: core.submit(requests, displaced, fork), requests)
        except BaseException:
            self._admission.release(*places)
            raise
        for request in requests:
            self._channels[request.id] = request.channel

    def keep(self, request_id: str) -> None:
        """Know a request also after it has ended and nobody holds it."""
        self._kept.append(self._channels[request_id])

    def channel(self, request_id: str) -> Channel | None:
        """The channel of a request; None for an unknown id. Raises `RequestError`."""
        return self._channels.get(check_id(request_id))

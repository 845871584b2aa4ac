"""Many clients that stream chats from one server, each a protocol on a socket of its own.

They parse no more than they count, so that hundreds of them in one process measure the server and not themselves.
Called by benchmarks of the server; `penstock.cli.load` has the clients for any server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast
from urllib.parse import urlsplit

from penstock.cli.load import PAUSE_S, Load

_READ_BYTES = 1 << 16
_SLOW_READ_BYTES = 512  # about one event
_EVENT = b"data: "


class StreamClient(asyncio.BufferedProtocol):
    """One request. `chunks_s` are the times at which events with new text were read, on the clock of `time`.

    One that `leaves_at` a number of chunks closes its socket then; one that `is_slow` pauses after every read.
    `on_change` is called after the first chunk, and at the end.
    """

    def __init__(
        self, request: bytes, on_change: Callable[[StreamClient], None], *, leaves_at: int | None, is_slow: bool
    ) -> None:
        self.chunks_s: list[float] = []
        self.num_events = 0
        self.is_cut = self.is_done = False
        self.is_slow = is_slow
        self.error: str | None = None
        self.closed = asyncio.Event()
        self._request = request
        self._on_change = on_change
        self._leaves_at = leaves_at
        self._buffer = bytearray(_SLOW_READ_BYTES if is_slow else _READ_BYTES)
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of a class of their own
        self._transport.write(self._request)

    def get_buffer(self, sizehint: int) -> bytearray:
        """Where to read to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Count the events that were read."""
        assert self._transport is not None
        *lines, self._rest = (self._rest + self._buffer[:nbytes]).split(b"\n")
        for line in lines:
            if line.startswith(_EVENT):
                self._count(line)
            elif line.startswith(b"HTTP/1.1 ") and not line.startswith(b"HTTP/1.1 200"):
                self.error = line.decode().strip()
        if self.is_done or self.error:
            self._transport.close()
        elif self._leaves_at is not None and len(self.chunks_s) >= self._leaves_at:
            self.is_cut = True
            self._transport.abort()
        elif self.is_slow:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(PAUSE_S, self._resume)

    def connection_lost(self, exc: Exception | None) -> None:
        """The request has ended."""
        if not (self.is_done or self.is_cut or self.error):
            self.error = "the stream ended without [DONE]"
        self.closed.set()
        self._on_change(self)

    def _count(self, line: bytes) -> None:
        self.num_events += 1
        if line.startswith(b"data: [DONE]"):
            self.is_done = True
        elif b'"error":' in line:
            self.error = line.decode()
        elif b'"content":"' in line and b'"content":""' not in line:
            self.chunks_s.append(time.perf_counter())
            if len(self.chunks_s) == 1:
                self._on_change(self)

    def _resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


class StreamClients:
    """Sends a load of chats. `clients` fills up while it runs.

    `streaming` is set once every client has read a chunk or has ended, `first_done` once one has its whole answer, and
    both at the end, also when a client cannot connect.
    """

    def __init__(self, url: str, load: Load) -> None:
        self.clients: list[StreamClient] = []
        self.streaming, self.first_done = asyncio.Event(), asyncio.Event()
        self._num_started = 0
        self._address = urlsplit(url)
        self._load = load

    async def run(self) -> None:
        """Send every request at its time, and wait until all have ended."""
        try:
            await self._run()
        finally:
            self.streaming.set()
            self.first_done.set()

    async def _run(self) -> None:
        load, rng = self._load, random.Random(f"{self._load.seed}/clients")
        begin_s = time.perf_counter()
        for number, due_s in enumerate(load.arrivals()):
            await asyncio.sleep(max(0.0, begin_s + due_s - time.perf_counter()))
            is_slow = rng.random() < load.slow
            leaves_at = rng.randint(1, load.max_tokens) if rng.random() < load.disconnecting else None
            client = StreamClient(self._request(number), self._note, leaves_at=leaves_at, is_slow=is_slow)
            host, port = self._address.hostname, self._address.port
            await asyncio.get_running_loop().create_connection(lambda client=client: client, host, port)  # type: ignore[misc]
            self.clients.append(client)
        for client in self.clients:
            await client.closed.wait()

    @property
    def num_events(self) -> int:
        """The number of events that all clients have read."""
        return sum(client.num_events for client in self.clients)

    def gaps_s(self) -> Sequence[float]:
        """The time between two chunks of the clients that read their whole answer without pauses."""
        timed = (client for client in self.clients if client.is_done and not client.is_slow)
        return [after - before for client in timed for before, after in pairwise(client.chunks_s)]

    def _note(self, client: StreamClient) -> None:
        """Follow a client that has read its first chunk, or has ended."""
        if not client.closed.is_set() or not client.chunks_s:
            self._num_started += 1
        if self._num_started == self._load.num_requests:
            self.streaming.set()
        if client.is_done:
            self.first_done.set()

    def _request(self, number: int) -> bytes:
        load = self._load
        message = {"role": "user", "content": load.prompt(number)}
        body = {"messages": [message], "max_tokens": load.max_tokens, "stream": True, "ignore_eos": load.ignore_eos}
        data = json.dumps(body).encode()
        head = f"POST {self._address.path}/v1/chat/completions HTTP/1.1\r\nhost: {self._address.netloc}\r\n"
        return f"{head}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data

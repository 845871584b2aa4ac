"""`HttpProtocol`: uvicorn's reader of HTTP/1.1, which gives up on a request whose head is too long or does not arrive.

uvicorn bounds neither: a client that goes on sending headers fills the memory, and one that sends none keeps its
connection forever. Such a request is a 431 or 408. Called by uvicorn for each connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.serving.errors import Failure, openai_envelope

MAX_HEAD_BYTES = 1 << 16  # of the request line and the headers
HEAD_TIMEOUT_S = 60.0

_TOO_LONG = Failure(431, f"the headers have more than {MAX_HEAD_BYTES} bytes", code="headers_too_large")
_TOO_LATE = Failure(408, f"the headers did not arrive within {HEAD_TIMEOUT_S:g} seconds", "timeout", "headers_timeout")
_REASONS = {431: "Request Header Fields Too Large", 408: "Request Timeout"}


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # uvicorn's own
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read; what arrives with the end of a head is not counted."""
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._num_head_bytes > MAX_HEAD_BYTES:
            self._give_up(_TOO_LONG)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """A head is complete."""
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._timer is None:
            self._num_head_bytes = 0
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up, _TOO_LATE)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, failure: Failure) -> None:
        """Answer, unless an earlier answer of this connection is under way, and close."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = to_json(openai_envelope(failure))
            head = f"HTTP/1.1 {failure.status} {_REASONS[failure.status]}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

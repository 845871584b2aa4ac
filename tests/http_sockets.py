"""HTTP over a plain socket, byte by byte, and uvicorn in a thread: for tests of what clients do to a server."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import uvicorn

from penstock.serving.http_protocol import HttpProtocol

PATIENCE_S = 60.0


@dataclass
class Answer:
    """What came over the socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def events(self) -> list[tuple[str, str]]:
        """(name, data) of server-sent events."""
        assert self.headers["content-type"].startswith("text/event-stream")
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        pattern = re.compile(r"event: (\w+)\ndata: (.*)")
        matches = [pattern.fullmatch(block) for block in blocks]
        return [(match[1], json.loads(match[2])) for match in matches if match]


class Connection:
    """A client's socket, byte by byte."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.file = self.socket.makefile("rb")

    def send_head(self, method: str, path: str, length: int) -> None:
        """The request's line and headers."""
        kind = "content-type: application/json\r\n"
        self.send(f"{method} {path} HTTP/1.1\r\nhost: test\r\n{kind}content-length: {length}\r\n\r\n".encode())

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_head(self) -> Answer:
        """Status and headers of the answer."""
        status = int(self.file.readline().split()[1])
        lines = iter(lambda: self.file.readline().decode().strip(), "")
        return Answer(status, dict(line.lower().split(": ", 1) for line in lines), b"")

    def read(self) -> Answer:
        """The whole answer."""
        answer = self.read_head()
        if answer.headers.get("transfer-encoding") == "chunked":
            while chunk := self.read_chunk():
                answer.body += chunk
        else:
            answer.body = self.file.read(int(answer.headers["content-length"]))
        return answer

    def read_chunk(self) -> bytes:
        """A piece of an answer that is streamed."""
        chunk = self.file.read(int(self.file.readline(), 16))
        self.file.readline()
        return chunk

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def wait_until(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    deadline, pulse = monotonic() + within_s, threading.Event()
    while not condition():
        assert monotonic() < deadline, "the condition did not come true in time"
        pulse.wait(0.002)


@contextmanager
def running(app: Any) -> Iterator[uvicorn.Server]:
    """uvicorn in a thread of its own, on a free port."""
    config = uvicorn.Config(
        app, port=0, http=HttpProtocol, lifespan="on", ws="none", log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)

    def run() -> None:
        with contextlib.suppress(SystemExit):  # its startup failed
            server.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

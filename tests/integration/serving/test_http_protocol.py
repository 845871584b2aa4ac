"""Heads of requests that are too long or never arrive, and clients that close one direction of their connection."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from penstock import InferenceEngine, ScriptedModel
from penstock.serving import app, http_protocol
from penstock.serving.http_protocol import MAX_HEAD_BYTES
from tests.http_sockets import Connection, running, wait_until
from tests.tokenizers_for_tests import byte_level

CHAT = json.dumps({"messages": [{"role": "user", "content": "what falls?"}], "max_tokens": 5}).encode()


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    tokenizer = byte_level()
    model = ScriptedModel(tokenizer.encode("water falls ", add_special_tokens=False))
    engine = InferenceEngine(model, tokenizer, batch_timeout_ms=0, max_sequence_length=8192)
    engine.start()
    yield engine
    engine.stop(0)


@pytest.fixture(scope="module")
def port(engine: InferenceEngine) -> Iterator[int]:
    with running(app(engine)) as server:
        yield server.servers[0].sockets[0].getsockname()[1]


def ask(connection: Connection, more: bytes = b"") -> int:
    """The status of a chat, with more headers."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n%b\r\n"
    connection.send(head % (len(CHAT), more) + CHAT)
    return connection.read().status


def send_until_closed(connection: Connection, data: bytes, times: int) -> None:
    try:
        for _ in range(times):
            connection.send(data)
    except OSError:
        pass  # the server does not wait for all of it


def test_head_is_get_without_a_body(port: int) -> None:
    """It was a 405, which made monitors and load balancers call the server down."""
    connection = Connection(port)
    for path in (b"/health", b"/ready", b"/v1/models"):
        connection.send(b"HEAD %b HTTP/1.1\r\nhost: test\r\n\r\n" % path)
        assert connection.read_head().status == 200
        assert ask(connection) == 200  # a body would be taken for the beginning of this answer
    connection.close()


def test_endless_headers_are_a_431(port: int) -> None:
    """They were kept in memory for as long as the client went on."""
    connection = Connection(port)
    connection.send(b"GET /health HTTP/1.1\r\nhost: test\r\n")
    send_until_closed(connection, b"a: " + b"x" * 997 + b"\r\n", 2 * MAX_HEAD_BYTES // 1000)
    answer = connection.read()
    connection.close()
    assert answer.status == 431
    assert json.loads(answer.body)["error"]["code"] == "headers_too_large"


def test_one_endless_header_is_a_431(port: int) -> None:
    connection = Connection(port)
    connection.send(b"GET /health HTTP/1.1\r\nhost: test\r\na: ")
    send_until_closed(connection, b"x" * 1000, 2 * MAX_HEAD_BYTES // 1000)
    assert connection.read().status == 431
    connection.close()


def test_long_headers_and_bodies_of_a_used_connection_are_read(port: int) -> None:
    connection = Connection(port)
    for _ in range(4):
        assert ask(connection, b"cookie: " + b"x" * (MAX_HEAD_BYTES // 2) + b"\r\n") == 200
    connection.close()


def test_headers_that_do_not_arrive_are_a_408(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that never ended their headers kept their connections for ever."""
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.05)
    connection = Connection(port)
    connection.send(b"GET /health HTTP/1.1\r\nhost: ")
    answer = connection.read()
    assert answer.status == 408
    with contextlib.suppress(ConnectionResetError):  # closed before the client, on a busy machine, had sent anything
        assert connection.file.read() == b""
    connection.close()


def test_a_connection_that_waits_for_its_answer_is_not_late(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 30.0)
    connection = Connection(port)
    assert ask(connection) == 200
    assert ask(connection) == 200
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_direction_has_left(engine: InferenceEngine, port: int, stream: bool) -> None:
    """Over TCP, it cannot be told from one that is gone: its request ends, its connection is closed."""
    connection = Connection(port)
    body = json.dumps({**json.loads(CHAT), "max_tokens": 8000, "stream": stream, "ignore_eos": True}).encode()
    connection.send_head("POST", "/v1/chat/completions", len(body))
    connection.send(body)
    connection.socket.shutdown(socket.SHUT_WR)
    while connection.file.read(65536):
        pass
    wait_until(lambda: engine.get_stats()["queue"]["num_requests"] == 0)
    connection.close()

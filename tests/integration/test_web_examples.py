"""The web services of examples/ under uvicorn, over sockets: long bodies, refusals, deadlines, clients that leave."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from penstock import ConfigurationError, InferenceEngine, SamplingParams, ScriptedModel
from tests.http_sockets import PATIENCE_S, Answer, Connection, running, wait_until
from tests.tokenizers_for_tests import byte_level

ROOT = Path(__file__).resolve().parents[2]
PROMPTLY_S = 10.0  # of 25 s that an endless request takes
TEXT = "water falls "
ENDLESS = 5000
EXAMPLES = ("web_service", "fastapi_service")
MODULES = ("web_service", "asgi", "fastapi_service", "fastapi_app", "disconnect", "sse", "shutdown")


@dataclass(frozen=True)
class Endpoint:
    """One way to ask one of the services."""

    example: str
    path: str
    streams: bool

    def body(self, question: str, max_tokens: int, deadline_s: float) -> bytes:
        """What is posted; web_service has no parameters in it."""
        if self.example == "web_service":
            return question.encode()
        messages = [{"role": "user", "content": question}]
        own = {"model": "demo", "stream": True} if self.example == "openai_server" else {"deadline_s": deadline_s}
        return json.dumps({"messages": messages, "max_tokens": max_tokens, **own}).encode()


PLAIN = Endpoint("web_service", "/", streams=True)
STREAM = Endpoint("fastapi_service", "/stream", streams=True)
CHAT = Endpoint("fastapi_service", "/chat", streams=False)
OPENAI = Endpoint("openai_server", "/v1/chat/completions", streams=True)
ENDPOINTS = (PLAIN, STREAM, CHAT)


def text_of(answer: Answer) -> str:
    """The generated text, streamed or not."""
    if answer.headers["content-type"] == "application/json":
        return str(json.loads(answer.body)["text"])
    names, pieces = zip(*answer.events, strict=True)
    assert names == ("text",) * (len(names) - 1) + ("done",)
    return "".join(pieces)


@dataclass
class Service:
    """One running example, and what is inside."""

    example: ModuleType
    engine: InferenceEngine
    model: ScriptedModel
    port: int

    def open(
        self, endpoint: Endpoint, question: str, max_tokens: int = 6, deadline_s: float = PATIENCE_S
    ) -> Connection:
        """Send a question, and wait for nothing."""
        if endpoint is PLAIN:
            self.example.PARAMS = SamplingParams(max_tokens=max_tokens)  # type: ignore[attr-defined]
            self.example.DEADLINE_S = deadline_s  # type: ignore[attr-defined]
        body = endpoint.body(question, max_tokens, deadline_s)
        connection = Connection(self.port)
        connection.send_head("POST", endpoint.path, len(body))
        connection.send(body)
        return connection

    def ask(self, endpoint: Endpoint, question: str, **arguments: Any) -> Answer:
        """Send a question and read the answer."""
        connection = self.open(endpoint, question, **arguments)
        answer = connection.read()
        connection.close()
        return answer

    def get(self, path: str) -> Answer:
        connection = Connection(self.port)
        connection.send_head("GET", path, 0)
        answer = connection.read()
        connection.close()
        return answer

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self.engine.get_stats()["queue"]["num_requests"]


def import_example(name: str, engine: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh copy of an example that serves with this engine."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    for module in MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)
    example = importlib.import_module(name)
    owner = {"web_service": "web_service", "fastapi_service": "fastapi_app"}[name]
    monkeypatch.setattr(f"{owner}.InferenceEngine", engine)
    return example


Serve = Callable[..., Service]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start the example of an endpoint; the engine has a scripted model, and these settings."""
    with contextlib.ExitStack() as stack:

        def start(endpoint: Endpoint, step_s: float = 0.0, **settings: Any) -> Service:
            tokenizer = byte_level()
            script = tokenizer.encode(TEXT, add_special_tokens=False)
            model = ScriptedModel(script, step_s=step_s)
            engine = InferenceEngine(
                model, tokenizer, **{"batch_timeout_ms": 0, "max_sequence_length": 8192, **settings}
            )
            example = import_example(endpoint.example, lambda: engine, monkeypatch)
            stack.callback(model.release)
            server = stack.enter_context(running(example.app))
            stack.callback(model.release)
            return Service(example, engine, model, server.servers[0].sockets[0].getsockname()[1])

        yield start


each_endpoint = pytest.mark.parametrize(
    "endpoint", ENDPOINTS, ids=lambda endpoint: f"{endpoint.example} {endpoint.path}"
)


@each_endpoint
def test_a_question_is_answered(serve: Serve, endpoint: Endpoint) -> None:
    service = serve(endpoint)
    answer = service.ask(endpoint, "what falls?", max_tokens=200)
    assert answer.status == 200
    assert text_of(answer).startswith(TEXT * 10)
    assert text_of(service.ask(endpoint, "what falls?", max_tokens=1)) == "w"  # the first token is the last one


@each_endpoint
def test_a_body_of_200_kb_in_two_chunks_arrives_whole(serve: Serve, endpoint: Endpoint) -> None:
    """The second chunk was lost."""
    service = serve(endpoint, max_sequence_length=1 << 19, kv_cache_tokens=1 << 19)
    question = "ö" * 50_000 + "water" * 20_000
    body = endpoint.body(question, 6, PATIENCE_S)
    assert len(body) >= 200_000
    connection = Connection(service.port)
    connection.send_head("POST", endpoint.path, len(body))
    connection.send(body[:99_999])
    assert service.get("/health").status == 200  # by now the first chunk has been read
    connection.send(body[99_999:])
    answer = connection.read()
    connection.close()
    assert answer.status == 200, answer.body
    assert text_of(answer)
    messages = [{"role": "user", "content": question}]
    prompt = service.engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert service.engine.get_stats()["totals"]["prompt_tokens"] == len(prompt["input_ids"])


@each_endpoint
def test_a_prompt_that_is_too_long_is_refused_with_400(serve: Serve, endpoint: Endpoint) -> None:
    """It was 200, and then nothing."""
    service = serve(endpoint, max_sequence_length=64)
    answer = service.ask(endpoint, "water " * 100)
    assert answer.status == 400
    assert b"64" in answer.body
    assert service.ask(endpoint, "water").status == 200


@pytest.mark.parametrize("endpoint", [STREAM, CHAT], ids=["stream", "chat"])
def test_messages_that_the_template_refuses_are_refused_with_400(serve: Serve, endpoint: Endpoint) -> None:
    service = serve(endpoint)
    body = json.dumps({"messages": [{"role": "robot", "content": "hi"}]}).encode()
    connection = Connection(service.port)
    connection.send_head("POST", endpoint.path, len(body))
    connection.send(body)
    answer = connection.read()
    connection.close()
    assert answer.status == 400
    assert b"no robots" in answer.body


@each_endpoint
def test_a_full_queue_is_429_and_says_when_to_come_back(serve: Serve, endpoint: Endpoint) -> None:
    service = serve(endpoint, max_batch_size=1, max_queue_size=1)
    service.model.hold()
    handles = [service.engine.generate([1])]
    wait_until(lambda: handles[0].status.value == "processing")
    handles.append(service.engine.generate([1]))
    answer = service.ask(endpoint, "water")
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert b"1 of 1 requests wait" in answer.body
    assert b"max_queue_size" not in answer.body  # which a client cannot change


@each_endpoint
def test_a_deadline_before_the_first_token_is_504(serve: Serve, endpoint: Endpoint) -> None:
    service = serve(endpoint)
    service.model.hold()
    answer = service.ask(endpoint, "water", deadline_s=0.1)
    assert answer.status == 504
    assert b"deadline" in answer.body


@each_endpoint
def test_a_deadline_while_tokens_come_shows(serve: Serve, endpoint: Endpoint) -> None:
    """The stream just ended, as if that were all."""
    service = serve(endpoint, step_s=0.005)
    for deadline_s in (0.4, 4, 20):  # the machine may be slow to begin
        answer = service.ask(endpoint, "water", max_tokens=ENDLESS, deadline_s=deadline_s)
        if not endpoint.streams or (answer.status == 200 and len(answer.events) > 6):
            break
    if endpoint.streams:
        assert answer.status == 200
        names = [name for name, _ in answer.events]
        assert names == ["text"] * (len(names) - 1) + ["error"]
        assert len(names) > 5
        assert "deadline" in answer.events[-1][1]
    else:
        assert answer.status == 504


@pytest.mark.parametrize("endpoint", [PLAIN, STREAM], ids=["web_service", "fastapi_service"])
def test_a_client_that_leaves_while_streaming_ends_its_request(serve: Serve, endpoint: Endpoint) -> None:
    service = serve(endpoint, step_s=0.005)
    connection = service.open(endpoint, "water", max_tokens=ENDLESS)
    assert connection.read_head().status == 200
    assert connection.read_chunk()
    assert service.num_requests == 1
    connection.close()
    wait_until(lambda: service.num_requests == 0, PROMPTLY_S)


@each_endpoint
@pytest.mark.parametrize("held", [True, False], ids=["no token yet", "generating"])
def test_a_client_that_leaves_before_its_answer_ends_its_request(serve: Serve, endpoint: Endpoint, held: bool) -> None:
    service = serve(endpoint, step_s=0.005)
    if held:
        service.model.hold()
    connection = service.open(endpoint, "water", max_tokens=ENDLESS)
    wait_until(lambda: service.num_requests == 1)
    connection.close()
    wait_until(lambda: service.num_requests == 0, PROMPTLY_S)


@each_endpoint
def test_a_client_that_leaves_inside_its_body_leaves_no_request(serve: Serve, endpoint: Endpoint) -> None:
    service = serve(endpoint, step_s=0.005)
    connection = Connection(service.port)
    connection.send_head("POST", endpoint.path, 1000)
    connection.send(b"water")
    assert service.get("/health").status == 200
    connection.close()
    assert service.ask(endpoint, "water").status == 200
    wait_until(lambda: service.num_requests == 0, PROMPTLY_S)


@each_endpoint
def test_a_stopped_engine_is_503_and_unhealthy(serve: Serve, endpoint: Endpoint) -> None:
    service = serve(endpoint)
    assert service.get("/health").status == 200
    assert b"running" in service.get("/health").body
    service.engine.stop()
    health = service.get("/health")
    assert (health.status, b"stopped" in health.body) == (503, True)
    assert service.ask(endpoint, "water").status == 503


SERVE = """
import sys
import penstock, shutdown, uvicorn
from penstock import InferenceEngine, SamplingParams, ScriptedModel
from tests.tokenizers_for_tests import byte_level

tokenizer = byte_level()
script = tokenizer.encode("water falls ", add_special_tokens=False)
engine = InferenceEngine(ScriptedModel(script, step_s=0.05), tokenizer, max_sequence_length=20_000)
penstock.InferenceEngine = lambda: engine
example = __import__(sys.argv[1])
shutdown.DRAIN_S = 0.2
example.PARAMS, example.DEADLINE_S = SamplingParams(max_tokens=10_000), 3600.0
uvicorn.run(example.app, port=0, lifespan="on")
"""


@pytest.mark.parametrize(
    ("endpoint", "number"),
    [(PLAIN, signal.SIGTERM), (PLAIN, signal.SIGINT), (STREAM, signal.SIGINT), (OPENAI, signal.SIGTERM)],
    ids=lambda value: getattr(value, "example", None) or value.name,
)
def test_a_signal_ends_the_server_although_a_stream_is_open(endpoint: Endpoint, number: signal.Signals) -> None:
    """uvicorn waited for the stream, here for 500 s, and the stream for the engine, which the lifespan's end closes."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    command = [sys.executable, "-c", SERVE, endpoint.example]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | paths) as server:
        try:
            assert server.stderr is not None
            addresses = (re.search(r"running on http://127\.0\.0\.1:(\d+)", line) for line in server.stderr)
            connection = Connection(int(next(address for address in addresses if address)[1]))
            body = endpoint.body("what falls?", 10_000, 3600.0)
            connection.send_head("POST", endpoint.path, len(body))
            connection.send(body)
            assert connection.read_head().status == 200
            chunks = [connection.read_chunk()]
            server.send_signal(number)
            while chunks[-1]:
                chunks.append(connection.read_chunk())
            connection.close()
            assert b"the engine was stopped" in b"".join(chunks[-3:])
            log = server.stderr.read()
            server.wait(PATIENCE_S)
            assert "Application shutdown complete" in log
            assert "Traceback" not in log
        finally:
            server.kill()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_engine_that_cannot_load_keeps_the_server_from_starting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConfigurationError("no such model")

    with running(import_example(name, refuse, monkeypatch).app) as server:
        assert not server.started

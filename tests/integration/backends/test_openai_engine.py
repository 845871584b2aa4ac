"""A server behind the `Engine` protocol: the contract against a served engine, and what other servers answer."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from penstock import (
    ConfigurationError,
    DeadlineExceeded,
    Delta,
    EngineClosed,
    EngineOverloaded,
    ExecutionError,
    GenerationConfig,
    InferenceEngine,
    RequestError,
    RequestTooLarge,
    SamplingParams,
    ScriptedModel,
)
from penstock.api.protocols import Engine
from penstock.backends.openai_engine import OpenAIEngine
from penstock.cli import main
from penstock.serving import app
from penstock.testing.contract import EngineContract
from tests.http_sockets import running
from tests.tokenizers_for_tests import byte_level

Answer = Callable[[Request, dict[str, Any]], Response]


def address(server: Any) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


class TestServedEngine(EngineContract):
    url = ""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        model = ScriptedModel(lambda tokens, index: 40 + len(tokens) % 30, vocab_size=300, step_s=0.001)
        native = InferenceEngine(model, byte_level(), batch_timeout_ms=0)
        native.start()
        try:
            with running(app(native)) as server:
                cls.url = address(server)
                yield
        finally:
            native.stop(0)

    def make_engine(self) -> Engine:
        return OpenAIEngine(self.url, return_token_ids=True)


@contextmanager
def fake(answer: Answer, model: str = "m") -> Iterator[str]:
    """A server that answers by a function; yields its address."""

    async def generate(request: Request) -> Response:
        return answer(request, await request.json())

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model"}] if model else []})

    paths = ("/v1/completions", "/v1/chat/completions")
    routes = [Route(path, generate, methods=["POST"]) for path in paths]
    with running(Starlette(routes=[Route("/v1/models", models), *routes])) as server:
        yield address(server)


def stream(*events: dict[str, Any] | str) -> Response:
    async def frames() -> AsyncIterator[str]:
        for event in events:
            yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"

    return StreamingResponse(frames(), media_type="text/event-stream")


def chat(text: str | None = None, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    delta = {"content": text} if text is not None else {}
    return {"object": "chat.completion.chunk", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


MESSAGES = [{"role": "user", "content": "hello"}]


async def test_a_chat_is_sent_with_what_the_caller_chose_and_nothing_else() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: Request, body: dict[str, Any]) -> Response:
        bodies.append(body)
        return stream(chat("hel"), chat("lo"), chat(finish="stop"), "[DONE]")

    with fake(answer) as url:
        async with OpenAIEngine(url) as engine:
            output = await engine.generate(MESSAGES)
            await engine.generate(MESSAGES, GenerationConfig(max_length=7))
            params = SamplingParams(temperature=0.5, top_k=5, stop=["x"], seed=3, max_tokens=None)
            deltas = [delta async for delta in engine.generate({"messages": MESSAGES, "tools": []}, params)]
    assert output.text == "".join(delta.text for delta in deltas) == "hello"
    assert output.outputs[0].finish_reason == "stop"
    assert bodies[0] == {"model": "m", "stream": True, "messages": MESSAGES}
    assert bodies[1]["max_tokens"] == 7
    assert {name: bodies[2][name] for name in ("temperature", "top_k", "stop", "seed", "tools", "top_p")} == {
        **{"temperature": 0.5, "top_k": 5, "stop": ["x"], "seed": 3},
        **{"tools": [], "top_p": 1.0},
    }
    assert "max_tokens" not in bodies[2]


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (400, {"error": {"message": "no", "code": "context_length_exceeded"}}, RequestTooLarge, "no"),
        (400, {"error": {"message": "bad top_p"}}, RequestError, "bad top_p"),
        (401, {"error": {"message": "who?"}}, RequestError, "valid key"),
        (404, {"error": {"message": "no such model"}}, RequestError, "no such model"),
        (429, {"error": {"message": "full"}}, EngineOverloaded, "full"),
        (500, {"error": {"message": "broken"}}, ExecutionError, "broken"),
        (200, {}, ExecutionError, "without a finish reason"),
    ],
)
async def test_what_a_server_refuses_is_a_typed_error(
    status: int, body: dict[str, Any], error: type[Exception], words: str
) -> None:
    def answer(request: Request, _: dict[str, Any]) -> Response:
        if status == 200:
            return stream(chat("cut"), "[DONE]")
        return JSONResponse(body, status_code=status, headers={"retry-after": "7"})

    with fake(answer) as url:
        async with OpenAIEngine(url, max_retries=0) as engine:
            with pytest.raises(error, match=words) as caught:
                await engine.generate("x")
    if isinstance(caught.value, EngineOverloaded):
        assert caught.value.retry_after_s == 7.0


async def test_a_request_that_was_refused_for_now_is_sent_again() -> None:
    calls: list[dict[str, Any]] = []

    def answer(request: Request, body: dict[str, Any]) -> Response:
        calls.append(body)
        if len(calls) == 1:
            return JSONResponse({"error": {"message": "full"}}, status_code=429, headers={"retry-after-ms": "1"})
        return stream(chat("yes"), chat(finish="stop"), "[DONE]")

    with fake(answer) as url:
        async with OpenAIEngine(url) as engine:
            assert (await engine.generate(MESSAGES, SamplingParams(seed=5))).text == "yes"
    assert calls[0] == calls[1]


async def test_an_error_in_the_middle_keeps_what_was_read() -> None:
    with fake(lambda request, body: stream(chat("half"), {"error": {"message": "it broke"}})) as url:
        async with OpenAIEngine(url) as engine:
            deltas: list[Delta] = []
            handle = engine.generate(MESSAGES, callback=deltas.append)
            with pytest.raises(ExecutionError, match="it broke"):
                await handle
    assert "".join(delta.text for delta in deltas) == "half"
    assert deltas[-1].finish_reason == "error"


async def test_a_deadline_carries_the_text_so_far() -> None:
    model = ScriptedModel([70], vocab_size=300, step_s=0.01)
    native = InferenceEngine(model, byte_level(), batch_timeout_ms=0)
    native.start()
    with running(app(native)) as server:
        async with OpenAIEngine(address(server)) as engine:
            for deadline_s in (1.0, 15.0):  # the machine may be slow to begin
                with pytest.raises(DeadlineExceeded) as caught:
                    await engine.generate([70], SamplingParams(max_tokens=2000, ignore_eos=True), deadline=deadline_s)
                if caught.value.output is not None and len(caught.value.output.text) > 2:
                    break
            assert caught.value.output is not None
            assert len(caught.value.output.text) > 2
    native.stop(0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logprobs=2),
        SamplingParams(logits_processors=[lambda ids, logits: logits]),
        SamplingParams(temperature=0, n=2, use_beam_search=True),
        SamplingParams(allowed_token_ids=[3]),
    ],
)
def test_what_the_api_cannot_express_is_refused_by_name(params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="cannot be sent"):
        OpenAIEngine("http://127.0.0.1:9").generate("x", params)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigurationError, match=r"no model can be found at http://127\.0\.0\.1:9/v1"):
        OpenAIEngine("http://127.0.0.1:9", max_retries=0).start()
    assert not any(thread.name == "penstock-openai" for thread in set(threading.enumerate()) - before)


def test_a_server_without_models_is_one_sentence() -> None:
    with fake(lambda request, body: stream(), model="") as url, pytest.raises(ConfigurationError, match="no model"):
        OpenAIEngine(url).start()


def test_a_stopped_engine_stays_stopped() -> None:
    engine = OpenAIEngine("http://127.0.0.1:9", model="m")
    engine.stop()
    with pytest.raises(EngineClosed):
        engine.start()
    with pytest.raises(EngineClosed):
        engine.generate("x")


def test_the_chat_command_talks_to_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: Request, body: dict[str, Any]) -> Response:
        assert request.headers["authorization"] == "Bearer secret"
        bodies.append(body)
        return stream(chat("hel"), chat("lo"), chat(finish="stop"), "[DONE]")

    monkeypatch.setattr("sys.stdin", StringIO("hi\nand?\n/exit\n"))
    with fake(answer) as url:
        assert main(["chat", "--url", url, "--api-key", "secret", "--temperature", "0.5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "hello\nhello\n"
    assert f"Chatting with m at {url}/v1" in captured.err
    assert [message["content"] for message in bodies[1]["messages"]] == ["hi", "hello", "and?"]
    assert bodies[1]["temperature"] == 0.5
    assert "max_tokens" not in bodies[1]


def test_the_chat_command_explains_what_does_not_go_with_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9", "--device", "cpu"]) == 2
    assert "--device and --url exclude each other" in capsys.readouterr().err
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 2
    assert "no model can be found at http://127.0.0.1:9/v1" in capsys.readouterr().err

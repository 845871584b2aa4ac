"""The server under uvicorn, over sockets: clients that leave, silence, mounting, the openai client."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import openai
import pytest
from fastapi import Depends, FastAPI, Header, HTTPException
from starlette.applications import Starlette
from starlette.routing import Mount

from penstock import InferenceEngine, SamplingParams
from penstock.engine.requests import input_processor
from penstock.serving import ServingSettings, app
from tests.http_sockets import PATIENCE_S, Connection, running, wait_until
from tests.scripted_engine import HoldingModel
from tests.tokenizers_for_tests import byte_level

TEXT = "water falls "
URL = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "what falls?"}]


@dataclass
class Service:
    engine: InferenceEngine
    model: HoldingModel
    port: int

    def post(self, path: str, **body: Any) -> Connection:
        """Send a request, and wait for nothing."""
        data, connection = json.dumps(body).encode(), Connection(self.port)
        connection.send_head("POST", path, len(data))
        connection.send(data)
        return connection

    @property
    def num_requests(self) -> int:
        return self.engine.get_stats()["queue"]["num_requests"]

    @property
    def num_free_blocks(self) -> float:
        return self.engine.get_stats()["cache_info"]["num_free_blocks"]


Serve = Callable[..., Service]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start an app, or what `wrap` makes of the engine."""
    with ExitStack() as stack:

        def start(
            wrap: Callable[[InferenceEngine], Any] = app, step_s: float = 0.0, hold_at: int = 0, **settings: Any
        ) -> Service:
            tokenizer = byte_level()
            script = tokenizer.encode(TEXT, add_special_tokens=False)
            model = HoldingModel(script, step_s=step_s, hold_at=hold_at)
            options = {"batch_timeout_ms": 0, "max_sequence_length": 8192, **settings}
            engine = InferenceEngine(model, tokenizer, **options)
            engine.start()
            stack.callback(engine.stop, 0)
            stack.callback(model.release)
            server = stack.enter_context(running(wrap(engine)))
            stack.callback(model.release)
            return Service(engine, model, server.servers[0].sockets[0].getsockname()[1])

        yield start


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [URL, "/v1/completions", "/inference/v1/generate", "/v1/responses", "/v1/messages"])
def test_a_client_that_leaves_ends_its_request_in_the_step_that_runs(serve: Serve, path: str, stream: bool) -> None:
    """Other servers went on until the last token."""
    service = serve(hold_at=4)
    free_blocks = service.num_free_blocks
    body: dict[str, Any] = {"messages": MESSAGES, "prompt": "water", "token_ids": [5], "max_tokens": 4000}
    body |= {"sampling_params": {"max_tokens": 4000}}
    if path == "/v1/responses":
        body = {"input": "water", "max_output_tokens": 4000}
    connection = service.post(path, **body, stream=stream)
    wait_until(service.model.is_held.is_set)
    assert service.num_requests == 1
    connection.close()
    wait_until(lambda: service.num_requests == 0)
    service.model.release()
    wait_until(lambda: service.num_free_blocks == free_blocks)
    assert service.model.plans == 4


def test_a_client_that_leaves_while_its_prompt_waits_ends_its_request(serve: Serve) -> None:
    service = serve()
    service.model.hold()
    for stream in (True, False):
        connection = service.post(URL, messages=MESSAGES, max_tokens=4000, stream=stream)
        wait_until(lambda: service.num_requests == 1)
        connection.close()
        wait_until(lambda: service.num_requests == 0)


def test_a_client_that_leaves_while_its_prompt_is_encoded_ends_its_request(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed open until the encoding ended."""
    go, service = threading.Event(), serve()
    monkeypatch.setattr(input_processor, "encode_words", lambda *_: [go.wait(PATIENCE_S)][1:])
    try:
        connection = service.post(URL, messages=MESSAGES, bad_words=["a"])
        wait_until(lambda: service.num_requests == 1)
        connection.close()
        wait_until(lambda: service.num_requests == 0)
    finally:
        go.set()


def test_one_of_many_prompts_leaves_nothing_behind(serve: Serve) -> None:
    service = serve(step_s=0.01)
    connection = service.post("/v1/completions", prompt=["a", "b", "c"], n=2, max_tokens=4000, stream=True)
    assert connection.read_head().status == 200
    assert connection.read_chunk()
    connection.close()
    wait_until(lambda: service.num_requests == 0)


def test_a_stream_shows_life_before_its_first_token(serve: Serve) -> None:
    """A proxy that saw nothing for a minute cut the connection."""
    service = serve(lambda engine: app(engine, ServingSettings(ping_interval_s=0.1)))
    service.model.hold()
    connection = service.post(URL, messages=MESSAGES, max_tokens=2, stream=True)
    head = connection.read_head()
    assert head.status == 200
    assert head.headers["content-type"].startswith("text/event-stream")
    assert head.headers["cache-control"] == "no-cache"
    assert b'"role":"assistant"' in connection.read_chunk()
    for _ in range(3):
        assert connection.read_chunk() == b": ping\n\n"
    service.model.release()
    chunks = iter(connection.read_chunk, b"")
    assert [chunk for chunk in chunks if chunk != b": ping\n\n"][-1].endswith(b"data: [DONE]\n\n")
    connection.close()


def test_a_connection_serves_several_requests(serve: Serve) -> None:
    service = serve()
    body = json.dumps({"messages": MESSAGES, "max_tokens": 3, "stream": True}).encode()
    connection = Connection(service.port)
    for _ in range(3):
        connection.send_head("POST", URL, len(body))
        connection.send(body)
        assert connection.read().body.endswith(b"data: [DONE]\n\n")
    connection.close()


def test_it_mounts_in_a_fastapi_application_with_its_own_dependencies_and_middleware(serve: Serve) -> None:
    def check(x_tenant: Annotated[str, Header()] = "") -> None:
        if x_tenant != "mine":
            raise HTTPException(403, "no tenant")

    seen: list[str | None] = []

    class Watching:
        """Pure ASGI middleware."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope.get("path"))
            await self.inner(scope, receive, send)

    def wrap(engine: InferenceEngine) -> FastAPI:
        parent = FastAPI()
        parent.add_middleware(Watching)

        @parent.get("/own")
        async def own() -> str:
            return (await engine.generate("water", SamplingParams(max_tokens=2))).text

        parent.mount("/llm", app(engine, dependencies=[Depends(check)]))
        return parent

    service = serve(wrap)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/llm/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.PermissionDeniedError, match="no tenant"):
        client.models.list()
    mine = client.with_options(default_headers={"x-tenant": "mine"})
    assert mine.models.list().data[0].max_model_len == 8192  # type: ignore[attr-defined]
    answer = mine.chat.completions.create(model="scripted", messages=MESSAGES, max_tokens=3)
    assert answer.choices[0].message.content == "water fa"[: len(answer.choices[0].message.content or "")]
    with pytest.raises(openai.NotFoundError):
        mine.models.retrieve("other")
    connection = Connection(service.port)
    connection.send_head("GET", "/own", 0)
    assert connection.read().body == b'"water"'
    connection.close()
    assert "/llm/v1/models" in seen
    assert "/own" in seen


def test_it_mounts_in_a_starlette_application_and_forwards_disconnects(serve: Serve) -> None:
    service = serve(lambda engine: Starlette(routes=[Mount("/a/b", app(engine))]), step_s=0.01)
    for stream in (True, False):
        connection = service.post(f"/a/b{URL}", messages=MESSAGES, max_tokens=4000, stream=stream)
        wait_until(lambda: service.num_requests == 1)
        connection.close()
        wait_until(lambda: service.num_requests == 0)


def test_the_openai_client_streams_and_raises_its_own_errors(serve: Serve) -> None:
    service = serve(lambda engine: app(engine, ServingSettings(served_model_name=("m",))))
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="x", max_retries=0)
    chat = client.chat.completions
    stream = chat.create(
        model="m", messages=MESSAGES, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith("water falls")
    assert chunks[-1].usage.completion_tokens == 6
    whole = chat.create(model="m", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == text
    assert len(whole.choices[0].logprobs.content) == 6
    with pytest.raises(openai.BadRequestError) as refused:
        chat.create(model="m", messages=MESSAGES * 2000, max_tokens=6)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        chat.create(model="other", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    service.model.step_s = 0.01
    with pytest.raises(openai.APIError, match="deadline"):
        list(chat.create(model="m", messages=MESSAGES, max_tokens=4000, stream=True, extra_body={"deadline": 0.2}))


def test_the_openai_client_reads_embeddings_in_both_encodings(serve: Serve) -> None:
    """Its default is base64, which other servers ignored."""
    service = serve()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="x", max_retries=0)
    default = client.embeddings.create(model="scripted", input=["water", "falls"])
    numbers = client.embeddings.create(model="scripted", input=["water", "falls"], encoding_format="float")
    assert [len(entry.embedding) for entry in default.data] == [8, 8]
    for one, other in zip(default.data, numbers.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
    assert len(client.embeddings.create(model="scripted", input=[5, 6], dimensions=3).data[0].embedding) == 3
    with pytest.raises(openai.BadRequestError, match="dimensions=9"):
        client.embeddings.create(model="scripted", input="water", dimensions=9)


def test_a_client_that_leaves_ends_its_embeddings(serve: Serve) -> None:
    service = serve()
    service.model.hold()
    connection = service.post("/v1/embeddings", input=["water"] * 20)
    wait_until(lambda: service.num_requests == 20)
    connection.close()
    service.model.release()
    wait_until(lambda: service.num_requests == 0)

"""OpenTelemetry: one span per request, with what it cost and how it ended, and nothing of its text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from penstock import ConfigurationError
from penstock.serving import ServingSettings
from penstock.serving.server import Server
from tests.unit.serving.service import CHAT, client_of, events
from tests.unit.testing.echo import EchoEngine

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="session")
def exported() -> InMemorySpanExporter:
    """Where the spans of this process go; a provider can be set only once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture(scope="module")
def client(exported: InMemorySpanExporter) -> Iterator[TestClient]:
    with client_of(ServingSettings(tracing=True)) as client:
        yield client


@pytest.fixture
def spans(exported: InMemorySpanExporter) -> InMemorySpanExporter:
    exported.clear()
    return exported


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_tells_what_a_chat_cost_and_how_it_ended(
    client: TestClient, spans: InMemorySpanExporter, stream: bool
) -> None:
    response = client.post("/v1/chat/completions", json={**CHAT, "n": 2, "stream": stream})
    if stream:
        events(response)
    span = only(spans)
    values: dict[str, Any] = dict(span.attributes or {})
    assert span.name == "POST /v1/chat/completions"
    assert span.kind is trace.SpanKind.SERVER
    assert values["gen_ai.operation.name"] == "chat"
    assert values["gen_ai.request.model"] == client.get("/v1/models").json()["data"][0]["id"]
    assert values["gen_ai.response.id"].startswith("chatcmpl-")
    assert values["gen_ai.response.finish_reasons"] == ("length", "length")
    assert values["gen_ai.usage.output_tokens"] == 12
    assert values["gen_ai.usage.input_tokens"] > 0
    assert 0 <= values["gen_ai.latency.time_to_first_token"] < 30
    assert values["http.response.status_code"] == 200
    assert "falls" not in str(values)


def test_embeddings_have_spans(client: TestClient, spans: InMemorySpanExporter) -> None:
    client.post("/v1/embeddings", json={"input": [1, 2, 3]})
    values = dict(only(spans).attributes or {})
    assert (values["gen_ai.operation.name"], values["gen_ai.usage.input_tokens"]) == ("embeddings", 3)


def test_a_span_continues_the_trace_of_its_client(client: TestClient, spans: InMemorySpanExporter) -> None:
    client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": PARENT})
    span = only(spans)
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]


def test_a_span_is_inside_that_of_the_program_that_mounts_the_app(spans: InMemorySpanExporter) -> None:
    with client_of(ServingSettings(tracing=True)) as inner:
        outer = FastAPI()
        outer.mount("/llm", inner.app)
        with TestClient(outer) as client:
            client.post("/llm/v1/embeddings", json={"input": [1]}, headers={"traceparent": PARENT})
    inside = next(span for span in spans.get_finished_spans() if "gen_ai.operation.name" in (span.attributes or {}))
    others = {span.context.span_id: span for span in spans.get_finished_spans() if span.context and span is not inside}
    assert inside.parent is not None
    if others:  # this version of FastAPI has spans of its own
        assert inside.parent.span_id in others
    assert f"{inside.parent.trace_id:032x}" == PARENT.split("-")[1]


@pytest.mark.parametrize("parent", ["", "00-zz-zz-01", "x" * 5000])
def test_a_traceparent_that_is_none_begins_a_new_trace(
    client: TestClient, spans: InMemorySpanExporter, parent: str
) -> None:
    assert client.post("/v1/embeddings", json={"input": [1]}, headers={"traceparent": parent}).status_code == 200
    assert only(spans).parent is None


def test_a_refused_request_has_a_span_with_its_status(client: TestClient, spans: InMemorySpanExporter) -> None:
    client.post("/v1/chat/completions", json={"messages": []})
    client.get("/made/up/path")
    first, second = spans.get_finished_spans()
    assert (first.attributes or {})["http.response.status_code"] == 400
    assert first.status.status_code is trace.StatusCode.UNSET
    assert second.name == "GET unknown"


def test_a_fault_of_the_engine_is_an_error_of_the_span(client: TestClient, spans: InMemorySpanExporter) -> None:
    client.app.state.model.fail_next(RuntimeError("broken"))  # type: ignore[attr-defined]
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 500
    span = only(spans)
    assert span.status.status_code is trace.StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "500"


def test_there_are_no_spans_unless_tracing_is_on(spans: InMemorySpanExporter) -> None:
    with client_of() as silent:
        assert silent.post("/v1/embeddings", json={"input": [1]}).status_code == 200
    assert spans.get_finished_spans() == ()


def test_tracing_without_opentelemetry_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'penstock\[otel\]'"):
        Server(EchoEngine(), ServingSettings(tracing=True))
    Server(EchoEngine(), ServingSettings())

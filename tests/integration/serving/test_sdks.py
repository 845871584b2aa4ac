"""The openai and anthropic clients: how they read responses and messages, streamed and at once, over sockets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from penstock import InferenceEngine, ScriptedModel
from penstock.serving import ServingSettings, app
from tests.http_sockets import running
from tests.integration.outside.suites import server
from tests.tokenizers_for_tests import byte_level

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}{{ tools }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <think></think> <tool_call> #}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
REPLIES = {
    "weather": f"<think>I must look.</think>Let me see. {CALL}",
    "rain": "It rains.",
    "where": '{"city": "Bern"}',
}
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
TOOL_USE: Any = {"name": "weather", "input_schema": PARAMETERS}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server(REPLIES, ServingSettings(), TEMPLATE) as url:
        yield url


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        yield client


def test_openais_reader_of_streams_builds_the_whole_response(openai_client: openai.OpenAI) -> None:
    with openai_client.responses.stream(model="scripted", input="weather", tools=[TOOL]) as stream:
        types = [event.type for event in stream]
        response = stream.get_final_response()
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    call = response.output[-1]
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.parsed_arguments) == ("weather", '{"city": "Bern"}', {"city": "Bern"})
    assert types[-1] == "response.completed"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 3


def test_an_agents_loop_of_responses_ends_with_the_answer(openai_client: openai.OpenAI) -> None:
    first = openai_client.responses.create(model="scripted", input="weather", tools=[TOOL])
    call = first.output[-1]
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = openai_client.responses.create(model="scripted", input=[result], previous_response_id=first.id)
    assert second.output_text == "It rains."
    listed = openai_client.responses.input_items.list(second.id).data
    assert [item.type for item in listed] == ["function_call_output"]
    assert openai_client.responses.retrieve(second.id).output_text == "It rains."
    openai_client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(second.id)


def test_openais_parser_gets_the_schema_of_a_model_through(openai_client: openai.OpenAI) -> None:
    class Weather(BaseModel):
        city: str

    response = openai_client.responses.parse(model="scripted", input="where?", text_format=Weather)
    assert response.output_parsed == Weather(city="Bern")


def test_anthropics_reader_of_streams_builds_the_whole_message(anthropic_client: anthropic.Anthropic) -> None:
    body: Any = {"model": "scripted", "max_tokens": 500, "messages": [{"role": "user", "content": "weather"}]}
    with anthropic_client.messages.stream(**body, tools=[TOOL_USE]) as stream:
        list(stream)
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    whole = anthropic_client.messages.create(**body, tools=[TOOL_USE])
    streamed, at_once = ([{**block.to_dict(), "id": None} for block in each.content] for each in (message, whole))
    assert streamed == at_once
    assert streamed[-1]["input"] == {"city": "Bern"}
    assert message.stop_reason == whole.stop_reason == "tool_use"
    counted = anthropic_client.messages.count_tokens(model="scripted", messages=body["messages"], tools=[TOOL_USE])
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_an_agents_loop_of_messages_ends_with_the_answer(anthropic_client: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "weather"}]
    first = anthropic_client.messages.create(model="scripted", max_tokens=500, messages=messages, tools=[TOOL_USE])
    call = first.content[-1]
    assert call.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = anthropic_client.messages.create(model="scripted", max_tokens=500, messages=messages)
    (text,) = second.content
    assert text.type == "text"
    assert (text.text, second.stop_reason) == ("It rains.", "end_turn")


def test_errors_reach_both_clients_as_their_own(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic
) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        anthropic_client.messages.create(model="unknown", max_tokens=5, messages=[{"role": "user", "content": "x"}])
    assert unknown.value.type == "not_found_error"
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.responses.create(model="scripted", input="x", background=True)
    assert refused.value.param == "background"
    assert anthropic_client.models.list().data[0].id == openai_client.models.list().data[0].id


@contextmanager
def held(**settings: Any) -> Iterator[tuple[ScriptedModel, str]]:
    """A server whose model waits in its first step until it is released."""
    tokenizer = byte_level()
    model = ScriptedModel(tokenizer.encode("water falls ", add_special_tokens=False), step_s=0.01)
    engine = InferenceEngine(model, tokenizer, batch_timeout_ms=0, max_sequence_length=8192)
    engine.start()
    try:
        model.hold()
        with running(app(engine, ServingSettings(**settings))) as uvicorn:
            yield model, f"http://127.0.0.1:{uvicorn.servers[0].sockets[0].getsockname()[1]}"
            model.release()
    finally:
        model.release()
        engine.stop(drain=0)


def test_a_silent_stream_has_pings_of_its_own_kind() -> None:
    """A proxy that saw nothing for a minute cut the connection."""
    message = {"max_tokens": 4, "messages": [{"role": "user", "content": "x"}], "stream": True}
    response = {"input": "x", "max_output_tokens": 4, "stream": True}
    with held(ping_interval_s=0.05) as (model, url):
        for path, body, ping in (
            ("/v1/messages", message, 'event: ping\ndata: {"type":"ping"}'),
            ("/v1/responses", response, ": ping"),
        ):
            model.hold()
            with httpx.stream("POST", url + path, json=body, timeout=20) as answer:
                text = ""
                for piece in answer.iter_text():
                    text += piece
                    if text.count(ping) >= 3:
                        model.release()
                assert text.count(ping) >= 3


def test_a_streamed_response_can_be_cancelled_by_its_id() -> None:
    settings = {"max_concurrent_requests": 1}  # the stream is the one
    with held(**settings) as (model, url), openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        model.release()
        stream = client.responses.create(model="scripted", input="what falls?", max_output_tokens=4000, stream=True)
        created = next(stream)
        assert created.type == "response.created"
        types: list[str] = []
        for event in stream:
            if event.type == "response.output_text.delta" and event.type not in types:
                assert client.responses.cancel(created.response.id).status == "cancelled"
            types.append(event.type)
        assert types[-2:] == ["error", "response.failed"]
        stored = client.responses.retrieve(created.response.id)
        assert stored.status == "cancelled"
        assert stored.output_text
        assert "water falls water falls".startswith(stored.output_text[:20])


def test_a_response_that_is_deleted_while_it_is_streamed_stays_deleted() -> None:
    """Regression: it was stored again when its stream ended, or when its client left."""
    with held() as (model, url), openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = client.responses.create(model="scripted", input="what falls?", max_output_tokens=8, stream=True)
        response_id = next(stream).response.id
        client.responses.delete(response_id)
        model.release()
        assert [event.type for event in stream][-1] == "response.incomplete"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response_id)


def test_a_response_that_is_still_streamed_cannot_be_continued() -> None:
    """Regression: the conversation went on without the answer."""
    with held() as (model, url), openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = client.responses.create(model="scripted", input="what falls?", max_output_tokens=8, stream=True)
        more = {"model": "scripted", "input": "and then?", "max_output_tokens": 2}
        more["previous_response_id"] = next(stream).response.id
        with pytest.raises(openai.BadRequestError, match="still being created"):
            client.responses.create(**more)
        model.release()
        assert [event.type for event in stream][-1] == "response.incomplete"
        assert client.responses.create(**more).status == "incomplete"

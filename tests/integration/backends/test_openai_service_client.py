"""`OpenAIInferenceServiceClient` over real sockets: against a served engine, and against what other servers answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from penstock import (
    ConfigurationError,
    EngineOverloaded,
    ExecutionError,
    RequestError,
    RequestTooLarge,
    WeightsError,
)
from penstock.backends import OpenAIInferenceServiceClient, WeightSyncController, create_inference_service_client
from penstock.serving import ServingSettings, app
from tests.http_sockets import running, wait_until
from tests.malformed_tool_calls import FAILURES
from tests.scripted_engine import replying_engine
from tests.tokenizers_for_tests import byte_level
from tests.unit.tools.texts import TOOLS

Answer = Callable[[dict[str, Any]], Response]
HELLO = [{"role": "user", "content": "Hello!"}]
NOW = {"retry-after-ms": "1"}  # so that no test waits for a pause


def address(server: Any) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer"))
    byte_level().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A served engine that answers "The answer is 4."."""
    with replying_engine(["The answer is 4."]) as engine, running(app(engine)) as server:
        yield address(server)


def client_of(url: str, **section: Any) -> OpenAIInferenceServiceClient:
    section = {"base_url": url, "model": "scripted", "api_key": "EMPTY", **section}
    return OpenAIInferenceServiceClient(DictConfig({"inference_service": section, "temperature": 0.7}))


@contextmanager
def fake(*answers: Response | Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives these answers in turn, the last one again and again; yields its address and the bodies."""
    bodies: list[dict[str, Any]] = []

    async def answer(request: Request) -> Response:
        bodies.append(await request.json())
        item = answers[min(len(bodies), len(answers)) - 1]
        return item if isinstance(item, Response) else item(bodies[-1])

    paths = ("/v1/completions", "/v1/chat/completions")
    with running(Starlette(routes=[Route(path, answer, methods=["POST"]) for path in paths])) as server:
        yield address(server), bodies


def refusal(status: int, code: str | None = None) -> Response:
    return JSONResponse({"error": {"message": "no", "code": code}}, status, NOW)


def text(tokens: list[str], logprobs: list[float | None], **more: Any) -> Response:
    """A text completion."""
    shape = {"tokens": tokens, "token_logprobs": logprobs}
    choice = {"index": 0, "text": "4", "finish_reason": "stop", "logprobs": shape}
    body = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    return JSONResponse(body | {"prompt_token_ids": [5, 6]} | more)


def chat(**more: Any) -> Response:
    """A chat completion."""
    content = [{"token": "token_id:7", "logprob": -0.5, "bytes": None, "top_logprobs": []}]
    message = {"role": "assistant", "content": "4"}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}} | more
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return JSONResponse(body | {"prompt_token_ids": [5, 6]})


FINE = text(["token_id:7", "token_id:8"], [-0.5, -0.25])


def test_the_record_holds_the_ids_of_the_engine(url: str) -> None:
    """Prompts were encoded again by the client, which need not give the ids that the server computed."""
    tokenizer, client = byte_level(), client_of(url)
    response = client.completion(prompt="What is 2+2?", max_tokens=100)
    record = response["nexrl_train"]
    assert record["prompt_tokens"] == tokenizer.encode("What is 2+2?")
    assert record["response_tokens"] == [*tokenizer.encode("The answer is 4.", add_special_tokens=False), 2]
    assert len(record["response_logprobs"]) == len(record["response_tokens"])
    response = client.generate(messages=HELLO)
    assert response["choices"][0]["message"]["content"] == "The answer is 4."
    assert response["nexrl_train"]["prompt_tokens"] == tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, return_dict=False
    )
    client.close()


async def test_every_call_has_a_twin_for_event_loops(url: str) -> None:
    client = client_of(url)
    plain, chatted = await asyncio.gather(client.acompletion("2+2?"), client.agenerate(HELLO))
    assert plain["nexrl_train"]["response_tokens"] == chatted["nexrl_train"]["response_tokens"]
    completion = await client.completions.acreate(prompt="2+2?", max_tokens=5)
    assert completion.choices[0].finish_reason == "length"
    assert len(completion.nexrl_train["response_tokens"]) == 5
    answer = await client.chat.completions.acreate(messages=HELLO)
    assert answer.choices[0].message.content == "The answer is 4."
    await client.aclose()


def test_one_client_serves_one_event_loop_after_another(url: str) -> None:
    client = client_of(url)

    async def call() -> str:
        response = await client.acompletion("2+2?")
        await client.aclose()
        return str(response["choices"][0]["finish_reason"])

    assert [asyncio.run(call()) for _ in range(2)] == ["stop", "stop"]


def test_all_samples_have_records(url: str) -> None:
    client = client_of(url)
    response = client.completion("2+2?", n=3)
    assert [len(choice["nexrl_train"]["response_tokens"]) for choice in response["choices"]] == [12] * 3
    assert response["nexrl_train"] == response["choices"][0]["nexrl_train"]
    client.close()


def test_a_prompt_may_be_token_ids(url: str) -> None:
    client = client_of(url)
    assert client.completion([5, 6, 7])["nexrl_train"]["prompt_tokens"] == [5, 6, 7]
    client.close()


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_repetition_sends_what_the_caller_chose(status: int) -> None:
    """The arguments were taken out of the call in the first attempt; later ones ran with those of the config."""
    with fake(refusal(status), refusal(status), FINE) as (url, bodies):
        client = client_of(url)
        client.completion("2+2?", max_tokens=100, temperature=0.0, top_k=4, stop=["x"])
        client.close()
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]
    assert {name: bodies[2][name] for name in ("max_tokens", "temperature", "top_k", "stop", "model")} == {
        **{"max_tokens": 100, "temperature": 0.0, "top_k": 4, "stop": ["x"]},
        **{"model": "scripted"},
    }


def test_what_the_server_refuses_is_not_repeated() -> None:
    with fake(refusal(400)) as (url, bodies):
        client = client_of(url)
        with pytest.raises(RequestError, match="refused the request"):
            client.completion("2+2?")
        client.close()
    assert len(bodies) == 1


async def test_errors_of_the_server_have_the_types_of_the_package() -> None:
    with fake(refusal(429), refusal(400, "context_length_exceeded"), refusal(503)) as (url, bodies):
        client = client_of(url, max_retries=0)
        with pytest.raises(EngineOverloaded):
            await client.acompletion("2+2?")
        with pytest.raises(RequestTooLarge):
            await client.agenerate(HELLO)
        with pytest.raises(ExecutionError):
            await client.acompletion("2+2?")
        await client.aclose()
    assert len(bodies) == 3  # max_retries=0 calls once; it used not to call at all


def test_a_call_sends_the_defaults_of_the_config_and_what_rl_needs() -> None:
    extra = {"min_p": 0.1, "skip_special_tokens": True}
    with fake(FINE, chat()) as (url, bodies):
        client = client_of(url, max_tokens=33)
        client.completion("2+2?", extra_body=extra, model="other", seed=None)
        client.generate(HELLO, max_completion_tokens=9, extra_body=extra)
        client.close()
    expected = {"model": "scripted", "max_tokens": 33, "temperature": 0.7, "logprobs": True, "min_p": 0.1}
    flags = {"include_stop_str_in_output": True, "no_stop_trim": True, "return_tokens_as_token_ids": True}
    assert bodies[0].items() >= (expected | flags | {"prompt": "2+2?", "skip_special_tokens": True}).items()
    assert bodies[1].items() >= {"messages": HELLO, "max_completion_tokens": 9, "logprobs": True, "min_p": 0.1}.items()
    assert "max_tokens" not in bodies[1]
    assert "min_tokens" not in bodies[0]  # forced to 10 once, without the caller's knowledge
    assert extra == {"min_p": 0.1, "skip_special_tokens": True}  # was changed in place


@pytest.mark.parametrize("backend", ["openai", "vllm", "sglang"])
def test_ids_in_the_names_of_tokens_are_read_whatever_the_backend_is_called(backend: str) -> None:
    """Only "vllm" read them; the others took `int` of the whole name."""
    with fake(FINE, chat()) as (url, _):
        client = client_of(url, backend=backend)
        records = [client.completion("2+2?")["nexrl_train"], client.generate(HELLO)["nexrl_train"]]
        client.close()
    assert records == [
        {"prompt_tokens": [5, 6], "response_tokens": [7, 8], "response_logprobs": [-0.5, -0.25]},
        {"prompt_tokens": [5, 6], "response_tokens": [7], "response_logprobs": [-0.5]},
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (text(["token_id:7", "token_id:8"], [-0.5, None]), "a token without a log probability"),
        (text(["token_id:7", "token_id:8"], [-0.5]), "2 tokens and 1 log probabilities"),
        (text(["5", "4"], [-0.5, -0.5]), "gives no token ids.*set inference_service.train_record to false"),
        (JSONResponse({"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": []}), "a choice"),
    ],
)
def test_a_record_that_would_not_be_whole_is_an_error(answer: Response, message: str) -> None:
    """Tokens and log probabilities were filtered one without the other, or left empty, and training data were lost."""
    with fake(answer) as (url, _):
        client = client_of(url)
        with pytest.raises(ExecutionError, match=message):
            client.completion("2+2?")
        client.close()


def test_without_a_record_nothing_is_asked_that_only_rl_needs() -> None:
    with fake(chat(logprobs=None)) as (url, bodies):
        client = client_of(url, train_record=False)
        response = client.generate(HELLO)
        client.close()
    assert "nexrl_train" not in response
    assert bodies[0].keys() == {"model", "messages", "max_tokens", "temperature"}


def test_prompts_are_encoded_here_only_for_servers_that_do_not_tell_and_checked_by_their_usage(folder: str) -> None:
    ids = byte_level().encode("2+2?")
    known = {"prompt_token_ids": None, "usage": {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": 9}}
    other = {"prompt_token_ids": None, "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}}
    with fake(text(["token_id:7"], [-0.5], **known), text(["token_id:7"], [-0.5], **other)) as (url, _):
        client = client_of(url, tokenizer=folder)
        assert client.completion("2+2?")["nexrl_train"]["prompt_tokens"] == ids
        with pytest.raises(ExecutionError, match=r"encoded it to 3 tokens.*set inference_service.tokenizer"):
            client.completion("2+2?")
        client.close()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"weight_version": 3}, {"weight_version": 3}),
        ({"metadata": {"weight_version": "step-9"}}, {"weight_version": "step-9"}),
        ({}, {"weight_version": 0}),
    ],
)
def test_the_version_of_the_weights_is_that_of_the_server_or_else_of_the_controller(
    more: dict[str, Any], expected: dict[str, Any]
) -> None:
    with fake(text(["token_id:7"], [-0.5], **more)) as (url, _):
        client = client_of(url)
        client.set_weight_sync_controller(WeightSyncController(), "default")
        assert client.completion("2+2?")["nexrl_train"].items() >= (expected | {"rollout_model_version": 0}).items()
        client.close()


def test_versions_of_each_token_are_kept_if_they_differ() -> None:
    def answer(body: dict[str, Any]) -> Response:
        response = json.loads(bytes(FINE.body))
        response["choices"][0] |= {"weight_versions": [3, 4]}
        return JSONResponse(response)

    with fake(answer) as (url, _):
        client = client_of(url)
        record = client.completion("2+2?")["nexrl_train"]
        client.close()
    assert (record["weight_version"], record["weight_versions"]) == (4, [3, 4])


def test_addresses_may_lack_the_scheme_and_may_have_the_version() -> None:
    """ "localhost:8000" was taken for a scheme, and "/v1" was added twice."""
    with fake(FINE) as (url, bodies):
        for written in (url, f"{url}/", f"{url}/v1", f"{url}/v1/", url.removeprefix("http://")):
            client = client_of(written)
            client.completion("2+2?")
            client.close()
    assert len(bodies) == 5


async def test_an_update_waits_for_calls_under_way_and_calls_wait_for_the_update() -> None:
    """Calls issued just before an update ran across it, and mixed weights."""
    arrived, may_answer, order = threading.Event(), threading.Event(), list[str]()

    def answer(body: dict[str, Any]) -> Response:
        order.append(body["prompt"])
        return FINE

    async def slow(request: Request) -> Response:
        body = await request.json()
        if body["prompt"] == "first":
            arrived.set()
            await asyncio.to_thread(may_answer.wait)
        return answer(body)

    controller = WeightSyncController(update=lambda update: order.append("update"))
    with running(Starlette(routes=[Route("/v1/completions", slow, methods=["POST"])])) as server:
        client = client_of(address(server))
        client.set_weight_sync_controller(controller, "policy")
        first = asyncio.create_task(client.acompletion("first"))
        await asyncio.to_thread(arrived.wait)
        update = asyncio.create_task(controller.async_weight_to_rollout_service("policy"))
        await asyncio.to_thread(wait_until, lambda: controller.check_rollout_service_status("policy") == "block")
        second = asyncio.create_task(client.acompletion("second"))
        may_answer.set()
        records = [(await task)["nexrl_train"] for task in (first, second)]
        await update
        await client.aclose()
    assert order == ["first", "update", "second"]
    assert [record["weight_version"] for record in records] == [0, 1]


async def test_a_cancelled_call_ends_its_request_on_the_server_and_its_lease() -> None:
    arrived, has_left = threading.Event(), threading.Event()

    async def hang(request: Request) -> Response:
        await request.json()
        arrived.set()
        while not await request.is_disconnected():  # noqa: ASYNC110 (starlette has nothing to wait for)
            await asyncio.sleep(0.01)
        has_left.set()
        return FINE

    controller = WeightSyncController(update=lambda update: None)
    with running(Starlette(routes=[Route("/v1/completions", hang, methods=["POST"])])) as server:
        client = client_of(address(server))
        client.set_weight_sync_controller(controller, "policy")
        task = asyncio.create_task(client.acompletion("2+2?"))
        await asyncio.to_thread(arrived.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await controller.async_weight_to_rollout_service("policy")
        await asyncio.to_thread(wait_until, has_left.is_set)
        await client.aclose()


async def test_after_a_failed_update_calls_raise_instead_of_waiting() -> None:
    def fail(update: object) -> None:
        raise OSError("the disk is full")

    controller = WeightSyncController(update=fail)
    with fake(FINE) as (url, bodies):
        client = client_of(url)
        client.set_weight_sync_controller(controller, "policy")
        with pytest.raises(WeightsError):
            controller.sync_weight_to_rollout_service("policy")
        with pytest.raises(WeightsError, match="the disk is full"):
            client.completion("2+2?")
        with pytest.raises(WeightsError, match="the disk is full"):
            await client.agenerate(HELLO)
        free = client_of(url, freeze_for_weight_sync=False)
        free.set_weight_sync_controller(controller, "policy")
        free.completion("2+2?")  # does not care for weights
        client.close()
        free.close()
    assert len(bodies) == 1


async def test_controllers_of_the_program_are_waited_for_in_either_form() -> None:
    class Waiting:
        tags: list[str]

        def wait_for_weight_sync(self, model_tag: str) -> None:
            self.tags.append(model_tag)

    class Telling:
        answers: list[str]

        def check_rollout_service_status(self, model_tag: str) -> str:
            return self.answers.pop(0)

    waiting, telling = Waiting(), Telling()
    waiting.tags, telling.answers = [], ["block", "continue", "block", "continue", "perhaps"]
    with fake(FINE) as (url, bodies):
        client = client_of(url, model_tag="judge")
        client.set_weight_sync_controller(waiting)
        client.completion("2+2?")
        await client.acompletion("2+2?")
        client.set_weight_sync_controller(telling, "policy")
        client.completion("2+2?")
        await client.acompletion("2+2?")
        with pytest.raises(ConfigurationError, match="perhaps"):
            client.completion("2+2?")
        with pytest.raises(ConfigurationError, match="has no wait_for_weight_sync"):
            client.set_weight_sync_controller(object(), "policy")
        await client.aclose()
    assert waiting.tags == ["judge", "judge"]
    assert (telling.answers, len(bodies)) == ([], 4)


def test_no_update_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls gave up after 60 s, while an update may take 3,000."""
    paused_s = 0.0

    class Telling:
        def check_rollout_service_status(self, model_tag: str) -> str:
            return "block" if paused_s < 3000 else "continue"

    def pause(seconds: float) -> None:
        nonlocal paused_s
        paused_s += seconds

    monkeypatch.setattr("penstock.backends.services.client.time.sleep", pause)
    with fake(FINE) as (url, bodies):
        client = client_of(url)
        client.set_weight_sync_controller(Telling(), "policy")
        client.completion("2+2?")
        client.close()
    assert paused_s >= 3000
    assert len(bodies) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"inference_service": {"max_tokens": 5}}, "model is missing"),
        ({"inference_service": {"model": "m", "max_token": 5}}, "did you mean 'max_tokens'"),
        ({"inference_service": {"model": "m", "temperature": 0.5}}, "temperature belongs beside inference_service"),
        ({"inference_service": {"model": "m", "max_tokens": "many"}}, "max_tokens"),
        ({"inference_service": {"model": "???"}}, "cannot be read"),
        ({"inference_service": {"model": "m"}, "temperature": "???"}, "cannot be read"),
        ({"inference_service": {"model": "m"}, "tempreature": 0.5}, "did you mean 'temperature'"),
        ({"inference_service": {"model": "m"}, "temperature": "hot"}, "temperature"),
        ({"inference_service": {"model": "m", "backend": "tinker"}}, "use create_inference_service_client"),
    ],
)
def test_a_config_that_means_nothing_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        OpenAIInferenceServiceClient(DictConfig(config))


def test_a_stream_is_refused_and_an_unknown_backend_too(folder: str) -> None:
    client = client_of("localhost:1")
    with pytest.raises(RequestError, match="stream is not supported"):
        client.completion("2+2?", stream=True)
    with pytest.raises(ConfigurationError, match="backend must be one of openai"):
        create_inference_service_client({"inference_service": {"model": "m", "backend": "carrier pigeon"}})
    client.close()


def test_t19_malformed_calls_in_what_a_server_answers_are_attempts_with_a_status(folder: str) -> None:
    """A malformed tool call ended a rollout."""
    tools = [tool.to_dict() for tool in TOOLS]
    with replying_engine([failure.text for failure in FAILURES]) as engine, running(app(engine)) as server:
        for failure in FAILURES:
            client = client_of(address(server), tokenizer=folder, tool_parser=failure.format)
            (choice,) = client.generate(HELLO, tools=tools)["choices"]
            attempts = [(attempt["status"], attempt["name"]) for attempt in choice["tool_attempts"]]
            assert attempts == [*failure.attempts]
            assert choice["nexrl_train"]["response_tokens"][-1] == 2
            client.close()


@pytest.mark.parametrize("format", sorted({failure.format for failure in FAILURES}))
def test_attempts_are_the_same_where_the_server_has_parsed_what_it_could(format: str, folder: str) -> None:
    failures = [failure for failure in FAILURES if failure.format == format]
    settings, tools = ServingSettings(tool_format=format), [tool.to_dict() for tool in TOOLS]
    with replying_engine([failure.text for failure in failures]) as engine, running(app(engine, settings)) as server:
        client = client_of(address(server), tokenizer=folder, tool_parser=format)
        for failure in failures:
            (choice,) = client.generate(HELLO, tools=tools)["choices"]
            assert [(attempt["status"], attempt["name"]) for attempt in choice["tool_attempts"]] == [*failure.attempts]
        client.close()


def test_calls_that_the_server_has_parsed_are_attempts_too() -> None:
    calls = [
        {"id": f"call_{index}", "type": "function", "function": {"name": "search", "arguments": arguments}}
        for index, arguments in enumerate(('{"query": "tea"}', '{"query": te', "[]"))
    ]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    with fake(chat(message=message, finish_reason="tool_calls")) as (url, _):
        client = client_of(url)
        (choice,) = client.generate(HELLO, tools=[tool.to_dict() for tool in TOOLS])["choices"]
        client.close()
    assert [attempt["status"] for attempt in choice["tool_attempts"]] == ["complete", "malformed", "malformed"]
    assert [call["id"] for call in choice["message"]["tool_calls"]] == ["call_0", "call_1", "call_2"]


def test_templates_are_rendered_here_with_arguments_as_objects(folder: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.tool_calls[0].function.arguments.query }}{% endfor %}"
    tokenizer.save_pretrained(str(tmp_path))
    call = {"type": "function", "function": {"name": "search", "arguments": '{"query": "tea"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    client = client_of("localhost:1", tokenizer=str(tmp_path))
    assert client.apply_chat_template(messages) == "tea"
    assert client.apply_chat_template(messages, tokenize=True) == tokenizer.encode("tea", add_special_tokens=False)
    assert messages[0]["tool_calls"] == [call]
    client.close()

"""`RemoteApiInferenceServiceClient` over every holder: what is sampled, what is kept, and what is refused."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from penstock import ConfigurationError, EngineOverloaded, ExecutionError, RequestError
from penstock.backends import (
    EngineServiceHolder,
    RemoteApiInferenceServiceClient,
    TinkerServiceHolder,
    WeaverServiceHolder,
    WeightSyncController,
    create_inference_service_client,
)
from penstock.backends.services import WeightUpdate, holder_update
from tests.malformed_tool_calls import FAILURES, Failure
from tests.scripted_engine import replying_engine
from tests.unit.backends.services.sdk import EOS, TOKENIZER, Sequenced, Service, tinker_with, tokens_of, weaver_with
from tests.unit.tools.texts import TEXTS, TOOLS, split

HELLO = [{"role": "user", "content": "Hello!"}]
TOOL_DICTS = [tool.to_dict() for tool in TOOLS]
ARGUMENTS = {"query": "tea, (green)", "n": 5, "tags": ["a", "b"]}


@pytest.fixture
def service() -> Service:
    service = Service()
    service.answer("The answer is 4.")
    return service


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer"))
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(params=["tinker", "weaver"])
def client(
    request: pytest.FixtureRequest, service: Service, folder: str, monkeypatch: pytest.MonkeyPatch
) -> RemoteApiInferenceServiceClient:
    """A client that makes its holder itself, as its config says."""
    connect: Callable[..., None] = {"tinker": tinker_with, "weaver": weaver_with}[request.param]
    connect(service, monkeypatch)
    return client_of(folder, backend=request.param, base_url="http://service:8000", max_tokens=33)


def client_of(folder: str, **section: Any) -> RemoteApiInferenceServiceClient:
    section = {"backend": "tinker", "model": "m", "tokenizer": folder, **section}
    return RemoteApiInferenceServiceClient(DictConfig({"inference_service": section, "temperature": 0.7}))


def test_the_client_connects_to_the_address_of_its_config(
    client: RemoteApiInferenceServiceClient, service: Service
) -> None:
    """The class could not be made, and the address was read from elsewhere."""
    response = client.completion("2+2?")
    assert service.made[0] == {"base_url": "http://service:8000"}
    assert service.made[-1].items() >= {"base_model": "m"}.items()
    assert (response["object"], response["model"]) == ("text_completion", "m")
    assert response["choices"][0]["text"] == "The answer is 4.</s>"
    assert response["nexrl_train"] == {
        "prompt_tokens": TOKENIZER.encode("2+2?"),
        "response_tokens": tokens_of("The answer is 4."),
        "response_logprobs": [-0.5] * 12,
    }
    assert response["choices"][0]["logprobs"]["token_logprobs"] == [-0.5] * 12
    assert response["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}


async def test_values_of_a_call_go_before_those_of_the_config_and_the_response_is_not_touched(
    client: RemoteApiInferenceServiceClient, service: Service
) -> None:
    """The holder got the values of the config, and `model="evil"` replaced the model in the response."""
    client.completion("2+2?", max_tokens=5, temperature=0.0, stop="x", top_p=0.9, top_k=4, seed=3, model="evil")
    client.completion("2+2?")
    response = await client.agenerate(HELLO, max_completion_tokens=6, extra_body={"top_k": 2}, model="evil")
    names = ("max_tokens", "temperature", "stop", "top_p", "top_k", "seed")
    assert [service.calls[0][name] for name in names] == [5, 0.0, ["x"], 0.9, 4, 3]
    assert [service.calls[1][name] for name in names[:2]] == [33, 0.7]
    assert [service.calls[2][name] for name in ("max_tokens", "temperature", "top_k")] == [6, 0.7, 2]
    assert response["model"] == "m"
    assert service.calls[2]["prompt"] == TOKENIZER.apply_chat_template(
        HELLO, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("is_async", [False, True])
async def test_all_samples_are_kept(client: RemoteApiInferenceServiceClient, service: Service, is_async: bool) -> None:
    """Of several samples only the first one was returned."""
    service.answer("one", "two", "three")
    response = await client.agenerate(HELLO, n=3) if is_async else client.generate(HELLO, n=3)
    assert [choice["message"]["content"] for choice in response["choices"]] == ["one", "two", "three"]
    assert [choice["nexrl_train"]["response_tokens"] for choice in response["choices"]] == [
        tokens_of(text) for text in ("one", "two", "three")
    ]
    assert service.calls[0]["num_samples"] == 3
    service.answer("one")
    with pytest.raises(ExecutionError, match="returned 1 samples of 3"):
        client.completion("2+2?", n=3)


@pytest.mark.parametrize("name", sorted(TEXTS))
async def test_all_tool_calls_are_kept(name: str, service: Service, folder: str, monkeypatch: Any) -> None:
    """Only the first call was found, and the finish reason stayed "stop"."""
    tinker_with(service, monkeypatch)
    client = client_of(folder, tool_parser=name)
    service.answer(TEXTS[name])
    for response in (client.generate(HELLO, tools=TOOL_DICTS), await client.agenerate(HELLO, tools=TOOL_DICTS)):
        (choice,) = response["choices"]
        functions = [call["function"] for call in choice["message"]["tool_calls"]]
        assert [function["name"] for function in functions] == ["search", "stop"]
        assert json.loads(functions[0]["arguments"]) == ARGUMENTS
        assert choice["message"]["content"] == "Let me see.\n\nDone."
        assert choice["finish_reason"] == "tool_calls"
        assert [attempt["status"] for attempt in choice["tool_attempts"]] == ["complete", "complete"]


def attempts_of(choice: dict[str, Any]) -> tuple[tuple[str, str | None], ...]:
    return tuple((attempt["status"], attempt["name"]) for attempt in choice["tool_attempts"])


@pytest.mark.parametrize("failure", FAILURES, ids=range(len(FAILURES)))
def test_t19_a_malformed_call_is_an_attempt_with_a_status_for_every_service(
    failure: Failure, service: Service, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed tool call ended a rollout."""
    service.answer(failure.text)
    for backend, connect in (("tinker", tinker_with), ("weaver", weaver_with)):
        connect(service, monkeypatch)
        client = client_of(folder, backend=backend, tool_parser=failure.format)
        (choice,) = client.generate(HELLO, tools=TOOL_DICTS)["choices"]
        assert attempts_of(choice) == failure.attempts
        num_complete = sum(status == "complete" for status, _ in failure.attempts)
        assert len(choice["message"].get("tool_calls", ())) == num_complete
        assert choice["nexrl_train"]["response_tokens"] == tokens_of(failure.text)


@given(st.sampled_from(FAILURES), st.lists(st.integers(0, 120), max_size=8))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_way_in_which_the_text_was_cut_into_tokens_changes_nothing(
    service: Service, folder: str, monkeypatch: pytest.MonkeyPatch, failure: Failure, places: list[int]
) -> None:
    tinker_with(service, monkeypatch)
    service.answer(split(failure.text, places))
    client = client_of(folder, tool_parser=failure.format)
    (choice,) = client.generate(HELLO, tools=TOOL_DICTS)["choices"]
    assert attempts_of(choice) == failure.attempts


def test_a_call_that_the_limit_cut_off_is_an_attempt_and_no_call(
    service: Service, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tinker_with(service, monkeypatch)
    service.answer('<tool_call>\n{"name": "search", "arguments": {"query": "te', stop_reason="length")
    (choice,) = client_of(folder, tool_parser="hermes").generate(HELLO, tools=TOOL_DICTS)["choices"]
    assert attempts_of(choice) == (("cut", "search"),)
    assert (choice["finish_reason"], choice["message"].get("tool_calls")) == ("length", None)


def test_reasoning_is_split_from_the_answer(service: Service, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tinker_with(service, monkeypatch)
    service.answer("<think>\nIt is 4.\n</think>\n\n4")
    client = client_of(folder, reasoning_parser="qwen3")
    (choice,) = client.generate(HELLO)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "4", "reasoning_content": "It is 4."}


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (Sequenced([5, EOS], None), "2 tokens and 0 log probabilities"),
        (Sequenced([5, EOS], [-0.5]), "2 tokens and 1 log probabilities"),
        (Sequenced([5, EOS], [-0.5, float("nan")]), "a token without a log probability"),
    ],
)
def test_a_record_that_would_not_be_whole_is_an_error(
    client: RemoteApiInferenceServiceClient, service: Service, sequence: Sequenced, message: str
) -> None:
    service.sequences = [sequence]
    with pytest.raises(ExecutionError, match=message):
        client.completion("2+2?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty is not known to this service"),
        ({"stream": True}, "stream is not supported"),
        ({"tools": TOOL_DICTS, "tool_choice": "required"}, "cannot be enforced"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_a_service_cannot_do_is_refused_before_anything_is_sampled(
    client: RemoteApiInferenceServiceClient, service: Service, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        client.generate(HELLO, **options)
    assert service.calls == []


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        (None, {}, "the conversation is empty"),
        (3, {}, "messages must be a list"),
        ("Hello!", {}, "messages must be a list"),
        ([3], {}, "message 0 must be an object"),
        (HELLO, {"stop": 3}, "stop must be a list"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(messages: Any, options: dict[str, Any], words: str) -> None:
    """These raised `TypeError` or `ValueError` of Python itself."""
    client = RemoteApiInferenceServiceClient({"inference_service": {"model": "m"}})
    with replying_engine(["Hi."]) as engine:
        client.set_service_holder(EngineServiceHolder(engine))
        with pytest.raises(RequestError, match=words):
            client.generate(messages, **options)


async def test_errors_of_the_sdk_have_the_types_of_the_package(
    client: RemoteApiInferenceServiceClient, service: Service
) -> None:
    class Refused(Exception):
        status_code = 400

    class Limited(Exception):
        status_code = 429

    for error, kind in (
        (Refused("no"), RequestError),
        (Limited("later"), EngineOverloaded),
        (OSError(), ExecutionError),
    ):
        service.error = error
        with pytest.raises(kind):
            client.completion("2+2?")
        with pytest.raises(kind):
            await client.acompletion("2+2?")


@pytest.mark.parametrize("backend", ["tinker", "weaver"])
def test_the_weight_sync_saves_trains_and_changes_the_path(
    backend: str, service: Service, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """001-41, 001-42."""
    connect: Callable[..., None] = {"tinker": tinker_with, "weaver": weaver_with}[backend]
    connect(service, monkeypatch)
    kind = {"tinker": TinkerServiceHolder, "weaver": WeaverServiceHolder}[backend]
    holder: TinkerServiceHolder | WeaverServiceHolder = kind("m", 8, tokenizer_path=folder)
    controller = WeightSyncController(update=holder_update(holder))
    client = client_of(folder, backend=backend)
    client.set_service_holder(holder)
    client.set_weight_sync_controller(controller, "policy")
    assert client.completion("2+2?")["nexrl_train"]["weight_version"] == 0
    assert holder.get_current_sampling_path() is None
    assert holder.forward_backward([], "cross_entropy") == "loss"
    assert holder.optim_step(1e-3) == "step"
    assert controller.train_worker_notify_weight_update("worker-0", "policy")
    assert holder.get_current_sampling_path() == f"{backend}://run/policy-1"
    assert service.made[-1]["model_path"] == f"{backend}://run/policy-1"
    assert client.completion("2+2?")["nexrl_train"]["weight_version"] == 1
    assert holder.compute_logprobs([1, 2, 3]) == [None, -0.5, -0.5]


def test_the_version_that_weaver_gives_goes_before_that_of_the_controller(
    service: Service, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weaver_with(service, monkeypatch, weight_version="step-7")
    client = client_of(folder, backend="weaver")
    client.set_weight_sync_controller(WeightSyncController(), "policy")
    assert client.completion("2+2?")["nexrl_train"]["weight_version"] == "step-7"


def test_closing_a_client_ends_the_session_that_it_began(
    client: RemoteApiInferenceServiceClient, service: Service
) -> None:
    client.close()  # no session yet
    for _ in range(2):
        service.answer("4")
        client.completion("2+2?")
        client.close()
        asyncio.run(client.aclose())
    assert sum("closed" in each for each in service.made) == 2  # a later call began another


def test_closing_a_client_leaves_the_holder_of_the_program(
    service: Service, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tinker_with(service, monkeypatch)
    client = client_of(folder)
    client.set_service_holder(TinkerServiceHolder("m", tokenizer_path=folder))
    client.completion("2+2?")
    client.close()
    assert not any("closed" in each for each in service.made)


def test_closing_weaver_ends_its_session(service: Service, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weaver_with(service, monkeypatch)
    holder = WeaverServiceHolder("m", tokenizer_path=folder)
    holder.close()
    assert service.made == []
    holder.sample_from_prompt("2+2?", 5)
    holder.close()
    holder.close()
    assert service.made.count({"closed": True}) == 1


def test_holders_of_the_program_need_two_methods_only(folder: str) -> None:
    class Holder:
        def sample_from_prompt(
            self, prompt: str, max_tokens: int, temperature: float, num_samples: int
        ) -> dict[str, Any]:
            text = f"{prompt} {max_tokens} {temperature} {num_samples}"
            return {"response": text, "prompt_tokens": [1], "response_tokens": [2], "response_logprobs": [-1.0]}

        def sample_from_messages(self, messages: Any, tools: Any, **sampling: Any) -> dict[str, Any]:
            return self.sample_from_prompt("chat", **sampling)

    client = client_of(folder, backend="of our own")
    with pytest.raises(ConfigurationError, match='set "tinker" or "weaver", or call set_service_holder'):
        client.completion("2+2?")
    client.set_service_holder(Holder())
    assert client.completion("hi", max_tokens=5)["choices"][0]["text"] == "hi 5 0.7 1"
    response = client.chat.completions.create(messages=HELLO, temperature=0)
    assert response.choices[0].message.content == "chat 2048 0.0 1"
    assert response.nexrl_train == {"prompt_tokens": [1], "response_tokens": [2], "response_logprobs": [-1.0]}
    with pytest.raises(ConfigurationError, match="has no sample_from_prompt"):
        client.set_service_holder(object())


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    replies = {"calls": TEXTS["hermes"], "": "The answer is 4."}
    with replying_engine(replies) as engine:
        yield engine


async def test_an_engine_of_this_process_is_a_service_too(engine: Any, folder: str) -> None:
    client = client_of(folder, tool_parser="hermes")
    client.set_service_holder(EngineServiceHolder(engine, tool_parser="hermes"))
    plain, twin = client.completion("2+2?"), await client.acompletion("2+2?")
    assert plain["nexrl_train"] == twin["nexrl_train"]
    assert plain["nexrl_train"]["response_tokens"] == tokens_of("The answer is 4.")
    assert plain["nexrl_train"]["prompt_tokens"] == TOKENIZER.encode("2+2?")
    messages = [{"role": "user", "content": "calls"}]
    (choice,) = (await client.agenerate(messages, tools=TOOL_DICTS))["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["search", "stop"]
    assert client.apply_chat_template(HELLO) == TOKENIZER.apply_chat_template(
        HELLO, add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize("failure", FAILURES, ids=range(len(FAILURES)))
def test_a_malformed_call_is_an_attempt_for_an_engine_of_this_process(failure: Failure, folder: str) -> None:
    with replying_engine([failure.text]) as engine:
        holder = EngineServiceHolder(engine, tool_parser=failure.format)
        result = holder.sample_from_messages(HELLO, 200, tools=TOOL_DICTS)
    assert tuple((attempt["status"], attempt["name"]) for attempt in result["tool_attempts"]) == failure.attempts
    assert result["is_valid"] == all(status == "complete" for status, _ in failure.attempts)


def test_the_backend_of_a_config_chooses_the_client(folder: str, tmp_path: Path) -> None:
    for backend in ("tinker", "weaver"):
        config = {"inference_service": {"backend": backend, "model": "m"}}
        assert isinstance(create_inference_service_client(config), RemoteApiInferenceServiceClient)


def test_a_renderer_of_another_package_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="renderer_name is not known here"):
        TinkerServiceHolder("m", renderer_name="qwen3")


def test_the_installed_sdk_takes_the_arguments_that_are_passed() -> None:
    import inspect

    import tinker

    inspect.signature(tinker.ServiceClient).bind(base_url=None)
    inspect.signature(tinker.ServiceClient.create_sampling_client).bind(None, base_model="m")
    inspect.signature(tinker.ServiceClient.create_lora_training_client).bind(None, "m", rank=8)
    inspect.signature(tinker.SamplingClient.sample).bind(None, "prompt", 1, "params")
    inspect.signature(tinker.SamplingClient.compute_logprobs).bind(None, "prompt")
    inspect.signature(tinker.TrainingClient.save_weights_for_sampler).bind(None, "name")
    inspect.signature(tinker.TrainingClient.forward_backward).bind(None, [], "cross_entropy", None)


class Weights:
    """A service whose weights change in the middle of whatever runs across an update."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.version = 0
        self.steps = list[asyncio.Future[None]]()

    async def step(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self.steps.append(future)
        await future

    def advance(self) -> None:
        self.steps = [future for future in self.steps if not future.done()]
        if self.steps:
            self.chance.choice(self.steps).set_result(None)

    async def asample_from_prompt(self, prompt: str, **sampling: Any) -> dict[str, Any]:
        """A token at each step, which is the version of the weights that made it."""
        tokens = list[int]()
        for _ in range(self.chance.randrange(1, 4)):
            tokens.append(self.version)
            await self.step()
        logprobs = [0.0] * len(tokens)
        return {"response": "", "prompt_tokens": [1], "response_tokens": tokens, "response_logprobs": logprobs}

    def sample_from_prompt(self, prompt: str, **sampling: Any) -> dict[str, Any]:
        raise NotImplementedError

    sample_from_messages = sample_from_prompt

    async def update(self, task: WeightUpdate) -> None:
        """Overwrite the weights in two steps; some updates fail."""
        self.version = -1
        await self.step()
        if self.chance.random() < 0.3:
            raise OSError("no space left")
        self.version = task.version


@pytest.mark.parametrize("mode", ["sync", "batch-async", "fully-async"])
async def test_no_response_mixes_weights_whatever_happens_to_clients_and_trainers(mode: str, folder: str) -> None:
    """100 seeds for each mode; the schedule is virtual."""
    outcomes = Counter[str]()
    for seed in range(100):
        chance = random.Random(seed)
        weights, tasks = Weights(chance), list[asyncio.Task[Any]]()
        controller = WeightSyncController(sync_mode=mode, update=weights.update)
        client = client_of(folder)
        client.set_service_holder(weights)
        client.set_weight_sync_controller(controller, "policy")
        for _ in range(40):
            action = chance.choice(("call", "call", "update", "batch", "cancel", "step", "step", "step", "step"))
            if action == "call":
                tasks.append(asyncio.create_task(client.acompletion("2+2?")))
            elif action == "update":
                tasks.append(asyncio.create_task(controller.async_weight_to_rollout_service("policy")))
            elif action == "batch":
                controller.trajectory_pool_notify_batch_ready("policy")
            elif action == "cancel" and tasks:
                chance.choice(tasks).cancel()
            else:
                weights.advance()
            for _ in range(chance.choice((0, 1, 15))):
                await asyncio.sleep(0)
        outcomes += await finished(tasks, weights, controller)
    assert min(outcomes[name] for name in ("dict", "bool", "WeightsError", "CancelledError")) > 20


async def finished(tasks: list[asyncio.Task[Any]], weights: Weights, controller: WeightSyncController) -> Counter[str]:
    """What came of the tasks, all of which end once the last update has succeeded."""
    last: asyncio.Task[bool] | None = None
    while not all(task.done() for task in tasks) or not controller.gate("policy").is_open:
        if last is None or last.done():
            last = asyncio.create_task(controller.async_weight_to_rollout_service("policy"))
        weights.advance()
        for _ in range(15):
            await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, *([last] if last else []), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, dict):
            record = outcome["nexrl_train"]
            assert set(record["response_tokens"]) == {record["weight_version"]}
    return Counter(type(outcome).__name__ for outcome in outcomes)

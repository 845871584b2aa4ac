"""The inference service of a rollout framework: its snippets run as they are written there, and keep their promises.

Numbers like 001-7 in the docstrings are the rows of the requirements checklist. Only import lines, model names and
hosts differ, and comments and blank lines are left out.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer

from penstock import InferenceEngine
from penstock.backends import (
    EngineServiceHolder,
    InferenceServiceClient,
    OpenAIInferenceServiceClient,
    RemoteApiInferenceServiceClient,
    WeightSyncController,
    create_inference_service_client,
    hf_tokenizer,
)
from penstock.serving import app
from tests.http_sockets import running
from tests.scripted_engine import replying_engine
from tests.tokenizers_for_tests import byte_level

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    """A native engine that answers "The answer is 4."."""
    with replying_engine(["The answer is 4."]) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: InferenceEngine) -> Iterator[str]:
    """Where the engine is served."""
    with running(app(engine)) as server:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tokenizer of the engine."""
    path = str(tmp_path_factory.mktemp("tokenizer"))
    byte_level().save_pretrained(path)
    return path


@pytest.fixture
def here(url: str, folder: str) -> Any:
    """A snippet with this host and this model; `inference_service.tokenizer` is where a tokenizer is named."""

    def replaced(source: str) -> str:
        source = source.replace(f'tokenizer: "{MODEL}"', f'tokenizer: "{folder}"')
        source = source.replace("from nexrl.inference_service_client", "from penstock.backends")
        for name in (MODEL, "Qwen/Qwen2.5-7B-Instruct"):
            source = source.replace(name, "scripted")
        for host in ("localhost", "tinker-service", "weaver-service"):
            source = source.replace(f"http://{host}:8000", url)
        return textwrap.dedent(source)

    return replaced


def run(source: str, **names: Any) -> SimpleNamespace:
    """Run a snippet as a script; gives its variables."""
    exec(compile(source, "<specification>", "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if name.isidentifier()})


@pytest.fixture
def client(here: Any, url: str, folder: str) -> Iterator[OpenAIInferenceServiceClient]:
    section = {"base_url": url, "model": "scripted", "tokenizer": folder, "api_key": "EMPTY", "max_tokens": 2048}
    client = OpenAIInferenceServiceClient(DictConfig({"inference_service": section, "temperature": 0.7}))
    yield client
    client.close()


def test_the_base_class_is_abstract_and_has_the_methods_of_its_listing() -> None:
    """001-1 to 001-4."""
    names = ("completion", "generate", "apply_chat_template")
    assert InferenceServiceClient.__abstractmethods__ == set(names)
    completion, generate, template = (inspect.signature(getattr(InferenceServiceClient, name)) for name in names)
    assert list(completion.parameters) == ["self", "prompt", "kwargs"]
    assert list(generate.parameters) == ["self", "messages", "kwargs"]
    assert list(template.parameters)[:3] == ["self", "messages", "tools"]
    assert template.parameters["tools"].default is None
    for client in (OpenAIInferenceServiceClient, RemoteApiInferenceServiceClient):
        assert next(iter(inspect.signature(client).parameters)) == "config"
    with pytest.raises(TypeError, match="abstract"):
        InferenceServiceClient()  # type: ignore[abstract]


def test_openai_style_access(client: OpenAIInferenceServiceClient) -> None:
    """001-5, 001-6."""
    response = client.completion(prompt="Hello", max_tokens=100)
    assert response["nexrl_train"]["response_tokens"]
    source = """
        response = client.completions.create(prompt="Hello", max_tokens=100)
        text = response
        response = client.chat.completions.create(messages=[...])
    """.replace("[...]", repr(MESSAGES))
    names = run(textwrap.dedent(source), client=client)
    assert isinstance(names.text, openai.types.Completion)
    assert names.text.nexrl_train == response["nexrl_train"]  # type: ignore[attr-defined]
    assert isinstance(names.response, openai.types.chat.ChatCompletion)
    assert names.response.choices[0].message.content == "The answer is 4."
    assert names.response.nexrl_train["response_tokens"] == response["nexrl_train"]["response_tokens"]  # type: ignore[attr-defined]


SYNC = '''
def set_weight_sync_controller(self, controller, model_tag: str):
    """Set the weight sync controller reference."""
    self._weight_sync_controller = controller
    self._model_tag = model_tag

def _wait_for_weight_sync(self):
    """Block inference until weight sync completes."""
    if self._weight_sync_controller is not None:
        self._weight_sync_controller.wait_for_weight_sync(self._model_tag)
'''


def test_weight_sync_as_written_works_with_the_controller(client: OpenAIInferenceServiceClient) -> None:
    """001-7 to 001-9: the methods of the snippet in place of the client's, and the client's own, do the same."""
    methods = run(SYNC)
    written = type(
        "Written",
        (OpenAIInferenceServiceClient,),
        {name: getattr(methods, name) for name in ("set_weight_sync_controller", "_wait_for_weight_sync")},
    )({"inference_service": {"base_url": client.config.base_url, "model": "scripted"}})
    for each in (written, client):
        controller = WeightSyncController(update=lambda update: None)
        each.set_weight_sync_controller(controller, "policy")
        assert each.completion("Hello")["nexrl_train"]["weight_version"] == 0
        controller.sync_weight_to_rollout_service("policy")
        assert controller.get_rollout_model_version("policy") == 1
        each.completion("Hello")
        each.set_weight_sync_controller(None, "policy")
        each.completion("Hello")
    written.close()


def test_the_openai_client_and_the_tokenizer_are_made_as_written(here: Any, url: str, folder: str) -> None:
    """001-22, 001-23, and 001-15: the model's name stands for the tokenizer where none is named."""
    config = DictConfig({"inference_service": {"api_key": "EMPTY", "base_url": url, "model": folder}})
    source = """
        self._oai_llm = openai.OpenAI(
            api_key=config.inference_service.api_key,
            base_url=config.inference_service.base_url + "/v1",
            timeout=1000,
        )
        tokenizer_path = config.inference_service.get("tokenizer", config.inference_service.model)
        self.tokenizer = hf_tokenizer(tokenizer_path)
    """
    this, source = SimpleNamespace(), textwrap.dedent(source)
    run(source, self=this, config=config, openai=openai, hf_tokenizer=hf_tokenizer)
    client = OpenAIInferenceServiceClient(config)
    assert client.tokenizer.encode("Hello") == this.tokenizer.encode("Hello")
    assert client.apply_chat_template(MESSAGES) == "<s><|user|>Hello!<end><|assistant|>"
    assert len(client.apply_chat_template(MESSAGES, tokenize=True)) == 9
    this._oai_llm.close()
    client.close()


EXTRACTION = """
def completion(self, prompt: str, **kwargs) -> dict[str, Any]:
    completion = self._oai_llm.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        logprobs=True,
        extra_body={
            "include_stop_str_in_output": True,
            "no_stop_trim": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        },
        **kwargs
    )
    self.answers.append(completion)
    completion_dict["nexrl_train"] = {
        "prompt_tokens": prompt_tokens,      # Token IDs
        "response_tokens": response_tokens,  # Token IDs
        "response_logprobs": response_logprobs  # Log probabilities
    }

    return completion_dict
"""


def test_the_request_as_written_is_answered_by_the_server(url: str, client: OpenAIInferenceServiceClient) -> None:
    """001-24 to 001-29. The snippet leaves open where its variables come from; the line with `answers` is added."""
    values = {"model": "scripted", "max_tokens": 9, "temperature": 0.7, "completion_dict": {}, "Any": Any}
    lists = {"prompt_tokens": [1], "response_tokens": [2], "response_logprobs": [-0.1]}
    source = run(EXTRACTION, **values, **lists)
    llm = openai.OpenAI(api_key="EMPTY", base_url=f"{url}/v1")
    this = SimpleNamespace(_oai_llm=llm, answers=[])
    assert source.completion(this, "What is 2+2?")["nexrl_train"] == lists
    (answer,) = this.answers
    record = client.completion("What is 2+2?", max_tokens=9)["nexrl_train"]
    assert len(answer.choices[0].logprobs.tokens) == len(record["response_tokens"]) == 9
    assert answer.choices[0].logprobs.token_logprobs == record["response_logprobs"]
    llm.close()


USAGE = f'''
from nexrl.inference_service_client import OpenAIInferenceServiceClient
from omegaconf import DictConfig

config = DictConfig({{
    "inference_service": {{
        "api_key": "EMPTY",
        "base_url": "http://localhost:8000",
        "model": "{MODEL}",
        "max_tokens": 2048
    }},
    "temperature": 0.7
}})

client = OpenAIInferenceServiceClient(config)
response = client.completion(prompt="What is 2+2?", max_tokens=100)
first = response
messages = [{{"role": "user", "content": "Hello!"}}]
response = client.generate(messages=messages, max_tokens=100)
'''


def test_the_usage_example(here: Any) -> None:
    """001-10, 001-11, 001-30 to 001-34, 001-49 to 001-54. The line with `first` is added."""
    names = run(here(USAGE))
    first, chat = names.first, names.response
    assert first.keys() >= {"id", "object", "created", "model", "choices", "usage", "nexrl_train"}
    assert (first["id"][:5], first["object"], first["model"]) == ("cmpl-", "text_completion", "scripted")
    (choice,) = first["choices"]
    assert choice["text"].startswith("The answer is 4.")
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["logprobs"]["token_logprobs"] == first["nexrl_train"]["response_logprobs"]
    tokenizer = byte_level()
    assert tokenizer.decode(first["nexrl_train"]["response_tokens"]) == choice["text"]
    assert first["nexrl_train"]["prompt_tokens"] == tokenizer.encode("What is 2+2?")
    assert (chat["id"][:9], chat["object"]) == ("chatcmpl-", "chat.completion")
    assert chat["choices"][0]["message"]["content"] == "The answer is 4."
    for response in (first, chat):
        record = response["nexrl_train"]
        assert len(record["response_tokens"]) == len(record["response_logprobs"]) == 12
    names.client.close()


REMOTE = '''
def set_service_holder(self, service_holder):
    """Set the service holder (TinkerServiceHolder or WeaverServiceHolder)."""
    self._service_holder = service_holder

def completion(self, prompt: str, **kwargs) -> dict[str, Any]:
    result = self._service_holder.sample_from_prompt(
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        num_samples=1,
    )
    return self._format_as_openai_response(result)
'''


def test_the_service_holder_pattern_as_written(engine: InferenceEngine) -> None:
    """001-35, 001-38 to 001-40: the methods of the snippet do the same as the client's own."""
    methods = run(REMOTE, Any=Any, max_tokens=100, temperature=0.7)
    own = {name: getattr(methods, name) for name in ("set_service_holder", "completion")}
    responses = []
    for kind in (type("Written", (RemoteApiInferenceServiceClient,), own), RemoteApiInferenceServiceClient):
        client = kind({"inference_service": {"backend": "tinker", "model": "scripted"}, "temperature": 0.7})
        client.set_service_holder(EngineServiceHolder(engine))
        responses.append(client.completion("What is 2+2?", max_tokens=100))
    for response in responses:
        assert response["object"] == "text_completion"
        assert response["nexrl_train"]["prompt_tokens"] == byte_level().encode("What is 2+2?")
        assert response["choices"][0]["text"] == "The answer is 4.</s>"


TOKENIZER = '''
def hf_tokenizer(name_or_path, correct_pad_token=True, correct_gemma2=True, **kwargs):
    """Create a HuggingFace tokenizer with corrections."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    if correct_pad_token and tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    if correct_gemma2 and "gemma-2-2b-it" in name_or_path:
        tokenizer.eos_token = "<end_of_turn>"
        tokenizer.eos_token_id = 107

    return tokenizer
'''


@pytest.mark.parametrize("name", ["llama", "gemma-2-2b-it"])
@pytest.mark.parametrize("options", [{}, {"correct_pad_token": False}, {"correct_gemma2": False}])
def test_tokenizers_have_the_corrections_as_written(name: str, options: dict[str, bool], tmp_path: Path) -> None:
    """001-43 to 001-45."""
    path = str(tmp_path / name)
    byte_level().save_pretrained(path)
    written = run(TOKENIZER, AutoTokenizer=AutoTokenizer).hf_tokenizer(path, **options)
    tokenizer = hf_tokenizer(path, **options)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (written.pad_token_id, written.eos_token_id)
    is_corrected = name == "gemma-2-2b-it" and options.get("correct_gemma2", True)
    assert tokenizer.eos_token_id == (107 if is_corrected else 2)
    assert (tokenizer.pad_token_id is None) == (not options.get("correct_pad_token", True))


CONFIGS = {
    "reference": f"""
        inference_service:
          api_key: "EMPTY"
          base_url: "http://localhost:8000"
          model: "{MODEL}"
          tokenizer: "{MODEL}"  # optional
          max_tokens: 2048
          max_retries: 10
          freeze_for_weight_sync: true
    """,
    "remote reference": f"""
        inference_service:
          backend: "tinker"  # or "weaver"
          model: "{MODEL}"
          max_tokens: 2048
          freeze_for_weight_sync: true
    """,
    "openai": f"""
        inference_service:
          backend: "openai"
          api_key: "EMPTY"
          base_url: "http://localhost:8000"
          model: "{MODEL}"
          max_tokens: 2048
          max_retries: 10
          freeze_for_weight_sync: true
          model_tag: "default"

        temperature: 0.7
    """,
    "tinker": f"""
        inference_service:
          backend: "tinker"
          base_url: "http://tinker-service:8000"
          model: "{MODEL}"
          max_tokens: 2048
          freeze_for_weight_sync: true

        temperature: 0.7
    """,
    "weaver": """
        inference_service:
          backend: "weaver"
          base_url: "http://weaver-service:8000"
          model: "Qwen/Qwen2.5-7B-Instruct"
          max_tokens: 2048
          freeze_for_weight_sync: true

        temperature: 0.7
    """,
    "matching tokenizer": f"""
        inference_service:
          model: "{MODEL}"
          tokenizer: "{MODEL}"  # Same path
    """,
}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("kind", ["mapping", "DictConfig"])
def test_every_config_makes_its_client_which_answers(
    name: str, kind: str, here: Any, url: str, engine: InferenceEngine
) -> None:
    """001-12 to 001-21, 001-36, 001-37, 001-46 to 001-48, 001-55."""
    values = yaml.safe_load(here(CONFIGS[name]))
    values["inference_service"].setdefault("base_url", url)
    client = create_inference_service_client(OmegaConf.create(values) if kind == "DictConfig" else values)
    assert client.freeze_for_weight_sync
    if isinstance(client, RemoteApiInferenceServiceClient):
        client.set_service_holder(EngineServiceHolder(engine))
    for response in (client.completion("What is 2+2?"), client.generate(MESSAGES)):
        assert response["model"] == "scripted"
        assert response["nexrl_train"]["response_tokens"][-1] == 2
    if isinstance(client, OpenAIInferenceServiceClient):
        client.close()

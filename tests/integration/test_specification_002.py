"""The backends of a library for analysing policies: its snippets run as they are written, and keep their promises.

Numbers like 002-7 in the docstrings are the rows of the requirements checklist. Only import lines, model names and
devices differ. What needs vLLM runs on a stand-in for it here; `backends/test_vllm_specification_002.py` has it itself.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

import penstock
from penstock import ConfigurationError, InferenceModule, PackageMissing, RequestError, SGLangBackend, VLLMBackend
from penstock import create_inference_module as create_module
from penstock.backends import (
    BackendConfig,
    BaseBackend,
    HuggingFaceBackendConfig,
    SGLangBackendConfig,
    VLLMBackendConfig,
    create_backend,
)
from penstock.backends.config import BACKEND_TYPES, CONFIGS
from penstock.demo import MODEL_DIR
from penstock.training import vllm as training_vllm
from tests import specification_002 as specification
from tests.unit.backends import fake_sglang
from tests.unit.backends.fake_vllm import VOCAB_SIZE, FakeLLM, install, logits_after

MODEL = str(MODEL_DIR)
CPU = {"device": "cpu", "torch_dtype": "float32"}
NATIVE: dict[str, Any] = {
    "backend_type": "huggingface",
    "model_name": MODEL,
    "backend_specific": {"device": "cpu", "torch_dtype": "float32"},
}
PROMPTS = ["def close(self):", "import os\n\nclass Reader:\n    def __init__(self", "x"]
RESPONSES = [" return None", " os", " = [1, 2, 3]\n"]


@pytest.fixture(scope="module")
def backend() -> Iterator[BaseBackend]:
    made = create_backend(NATIVE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseBackend]:
    install(monkeypatch)
    made = create_backend({"backend_type": "vllm", "model_name": "gpt2"})
    yield made
    made.close()


@pytest.fixture
def _without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)


HERE = {'"gpt2"': repr(MODEL), '"cuda"': '"cpu", "torch_dtype": "float32"'}


def run_snippet(snippet: str, **names: Any) -> dict[str, Any]:
    """Run a snippet over the shipped model in float32 on the CPU; all names that are then defined."""
    return specification.run(snippet, HERE, **names)


def plain_logits(model: Any, tokenizer: Any, prompt: str, response: str) -> torch.Tensor:
    """The logits in front of each token of the response, by one plain forward pass without padding."""
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(response, add_special_tokens=False)
    logits: torch.Tensor = model(torch.tensor([before + after])).logits[0]
    return logits[len(before) - 1 : -1]


# Making a backend.


def test_a_backend_is_made_from_a_dict() -> None:
    """002-7, 002-12, 002-28."""
    names = run_snippet(specification.CREATE)
    made = names["backend"]
    assert isinstance(made, BaseBackend)
    assert made.is_loaded()
    assert names["printed"] == [names["response"]]
    assert isinstance(names["response"], str)
    made.close()
    assert not made.is_loaded()


@pytest.mark.parametrize("snippet", [specification.FROM_FILE, specification.DEFAULTS], ids=["load", "defaults"])
def test_a_backend_is_made_from_a_shipped_file(snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """002-8, 002-10, 002-25."""
    monkeypatch.chdir(Path(penstock.__file__).parents[1])
    names = run_snippet(snippet)
    assert names["backend"].is_loaded() == (snippet is specification.FROM_FILE)
    assert names["backend"].config == BackendConfig("huggingface", None)
    names["backend"].close()


def test_every_kind_has_a_file_of_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """002-25: the same as leaving everything out."""
    for kind in ("huggingface", "vllm", "sglang"):
        assert BackendConfig.from_file(CONFIGS / f"{kind}_default.yaml") == BackendConfig(kind)
    assert {path.stem for path in CONFIGS.iterdir()} == {
        f"{kind}_default" for kind in ("huggingface", "vllm", "sglang")
    }


def test_a_backend_is_made_from_the_section_of_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """002-11."""
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp/experiment_config.yaml").write_text(yaml.safe_dump({"backend": NATIVE, "seed": 3}))
    monkeypatch.chdir(tmp_path)
    names = run_snippet(specification.FROM_EXPERIMENT)
    assert names["backend"].config.model_name == MODEL
    assert names["backend"].is_loaded()
    names["backend"].close()
    section = OmegaConf.create({"backend": NATIVE}).backend
    assert create_backend(section).config == names["backend"].config
    assert create_backend({}).config == BackendConfig("huggingface", None)


def test_a_config_is_read_from_json_and_comes_back_from_a_dict(tmp_path: Path) -> None:
    """002-9, 002-10, 002-26."""
    values = {"backend_type": "vllm", "model_name": "m", "backend_specific": {"tensor_parallel_size": 2}}
    (tmp_path / "a.json").write_text(json.dumps(values))
    config = BackendConfig.from_file(tmp_path / "a.json")
    assert config == BackendConfig("vllm", "m", VLLMBackendConfig(tensor_parallel_size=2))
    assert BackendConfig.from_dict(config.to_dict()) == config
    for path, text in (("no.yaml", None), ("bad.yaml", "a: ["), ("bad.json", "{"), ("list.yaml", "- 1")):
        if text is not None:
            (tmp_path / path).write_text(text)
        with pytest.raises(ConfigurationError, match=r"cannot read|must be a mapping"):
            BackendConfig.from_file(tmp_path / path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend_type": "vlm"}, "no backend_type 'vlm': use 'huggingface', 'native', 'vllm', 'sglang'"),
        ({"backend_typ": "vllm"}, "no key 'backend_typ'; did you mean 'backend_type'"),
        ({"device": "cpu"}, "'device': it is one of backend_specific of huggingface and native"),
        ({"backend_specific": {"devise": "cpu"}}, "backend_specific of huggingface has no key 'devise'; .*'device'"),
        ({"backend_specific": {"tensor_parallel_size": 2}}, "it is one of backend_specific of vllm"),
        ({"backend_type": "vllm", "backend_specific": {"tp_size": 2}}, "of huggingface and native and sglang"),
        ({"backend_specific": {"options": None}}, "options must be a mapping, not None"),
        ({"backend_type": "vllm", "backend_specific": {"options": [1]}}, "options must be a mapping"),
        ({"backend_specific": {"device": 0}}, "device: Input should be a valid string"),
        ({"backend_specific": 3}, "backend_specific must be a mapping, not 3"),
        ({"model_name": 3}, "model_name must be a name"),
        ({"backend_specific": {"torch_dtype": "float7"}}, "torch_dtype='float7': use float32"),
        ({"backend_specific": {"tp_size": 0}}, "tp_size must be an integer from 1"),
        ({"backend_specific": {"options": {"max_batchsize": 2}}}, "did you mean 'max_batch_size'"),
        ({"backend_specific": {"options": {"device": "cpu"}}}, "device does not belong into options"),
        ({"backend_type": "vllm", "backend_specific": {"options": {"logprobs_mode": "x"}}}, "leave it out of options"),
        (
            {"backend_type": "vllm", "backend_specific": {"options": {"model": "x"}}},
            "model does not belong into options",
        ),
        ({"backend_type": "vllm", "backend_specific": {"gpu_memory_utilization": 0}}, "a number above 0 and at most 1"),
        ({"backend_type": "vllm", "backend_specific": {"max_model_len": 1.5}}, "max_model_len must be an integer"),
        ({"backend_type": "vllm", "backend_specific": {"options": {"max_model_len": 9}}}, "set it beside them"),
    ],
)
def test_a_wrong_config_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    """002-13, 002-20, 002-27, 002-50, 002-51, 002-52."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        create_backend(values)
    assert isinstance(caught.value, ValueError)


def test_settings_of_another_backend_are_refused() -> None:
    """002-51."""
    with pytest.raises(ConfigurationError, match="takes a VLLMBackendConfig, not a HuggingFaceBackendConfig"):
        BackendConfig("vllm", "m", HuggingFaceBackendConfig())
    with pytest.raises(ConfigurationError, match="from a mapping or a BackendConfig"):
        create_backend("vllm")  # type: ignore[arg-type]


def test_tensor_parallelism_is_vllms() -> None:
    """002-15, 002-18: refused with the remedy, after the check of divisibility."""
    with pytest.raises(ConfigurationError, match="num_gpus=8 is not divisible by tp_size=3"):
        HuggingFaceBackendConfig(tp_size=3, num_gpus=8)
    with pytest.raises(ConfigurationError, match=r"tp_size=2.*'vllm' with tensor_parallel_size"):
        run_snippet(specification.HYBRID, create_backend=create_backend)
    with pytest.raises(ConfigurationError, match=r"tp_size=2.*'vllm' with tensor_parallel_size"):
        create_backend({"backend_specific": {"tp_size": 2, "num_gpus": 8}})
    assert HuggingFaceBackendConfig(tp_size=1, num_gpus=1) != HuggingFaceBackendConfig()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_have_the_dtype_that_is_set(dtype: str) -> None:
    """002-13."""
    made = create_backend({"model_name": MODEL, "backend_specific": {"device": "cpu", "torch_dtype": dtype}})
    assert {str(each.dtype) for each in made.backend.model.parameters()} == {f"torch.{dtype}"}  # type: ignore[attr-defined]
    assert len(made.get_logprobs("import", " os")) == 1
    made.close()


def test_batches_are_split_across_the_replicas_of_num_gpus() -> None:
    """002-3, 002-17: one replica for each GPU; with `device="cpu"`, that many on the CPU."""
    single = create_backend({"model_name": MODEL, "backend_specific": CPU})
    made = create_backend({"backend_type": "native", "model_name": MODEL, "backend_specific": CPU | {"num_gpus": 2}})
    prompts = [f"def f{number}(x):" for number in range(6)]
    options = {"max_length": 5, "do_sample": False, "return_logits": True}
    for result, expected in zip(made.generate(prompts, **options), single.generate(prompts, **options), strict=True):
        assert result["text"] == expected["text"]
        np.testing.assert_allclose(result["logits"], expected["logits"], atol=1e-3)
    routing = made.backend.engine.get_stats()["routing"]  # type: ignore[attr-defined]
    assert all(replica["num_requests"] > 0 for replica in routing)
    made.get_logits(prompts[0], " return", compute_gradients=True).sum().backward()
    assert next(made.backend.model.parameters()).grad is not None  # type: ignore[attr-defined]
    made.close()
    single.close()


def test_more_gpus_than_there_are_and_a_single_device_are_refused() -> None:
    """002-15, 002-16."""
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="num_gpus=2, and there is no GPU: device='cpu' makes 2"):
            create_backend({"model_name": MODEL, "backend_specific": {"num_gpus": 2}}).load()
    for specific in ({"device": "cuda:1"}, {"device_map": {"": 1}}):
        with pytest.raises(ConfigurationError, match="device cuda:1 is one device, for num_gpus=2"):
            HuggingFaceBackendConfig(**specific, num_gpus=2)  # type: ignore[arg-type]
    for count in (0, True, "two", 1.5):
        with pytest.raises(ConfigurationError, match="num_gpus"):
            HuggingFaceBackendConfig(num_gpus=count)  # type: ignore[arg-type]


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"": "cpu"}])
def test_a_device_map_overrides_the_device(device_map: object) -> None:
    """002-14: on a machine without a GPU, every strategy means the CPU."""
    if torch.cuda.is_available() and device_map in ("auto", "balanced"):
        pytest.skip("a strategy finds the GPU")
    specific = {"device": "cuda:99", "device_map": device_map}
    made = create_backend({"model_name": MODEL, "backend_specific": specific})
    made.load()
    made.close()


def test_the_snippet_of_a_device_map_loads() -> None:
    """002-14."""
    names = run_snippet(specification.DEVICE_MAP, create_backend=create_backend)
    assert names["backend"].is_loaded()
    names["backend"].close()


def test_the_listed_settings_are_read(tmp_path: Path) -> None:
    """002-12 to 002-15, 002-19 to 002-24: of the first file `tp_size` alone is refused, with the remedy."""
    (tmp_path / "vllm.yaml").write_text(specification.VLLM_YAML)
    (tmp_path / "sglang.yaml").write_text(specification.SGLANG_YAML)
    (tmp_path / "huggingface.yaml").write_text(specification.HUGGINGFACE_YAML)
    config = BackendConfig.from_file(tmp_path / "vllm.yaml")
    assert config == BackendConfig("vllm", "gpt2", VLLMBackendConfig(2, 0.9, 2048))
    config = BackendConfig.from_file(tmp_path / "sglang.yaml")
    assert config == BackendConfig("sglang", "gpt2", SGLangBackendConfig(2, 0.85, 2048))
    with pytest.raises(ConfigurationError, match=r"tp_size=2.*'vllm' with tensor_parallel_size"):
        BackendConfig.from_file(tmp_path / "huggingface.yaml")
    (tmp_path / "huggingface.yaml").write_text(specification.HUGGINGFACE_YAML.replace("tp_size: 2", "tp_size: 1"))
    config = BackendConfig.from_file(tmp_path / "huggingface.yaml")
    assert config == BackendConfig("huggingface", "gpt2", HuggingFaceBackendConfig("cuda", "float16", "auto", 1))


def test_a_device_map_over_several_devices_is_refused() -> None:
    """002-14."""
    for device_map, message in (({"a": 0, "b": "cpu"}, "names 2 devices"), (3, "must be a strategy or a mapping")):
        with pytest.raises(ConfigurationError, match=message):
            HuggingFaceBackendConfig(device_map=device_map)  # type: ignore[arg-type]


def test_settings_reach_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """002-4, 002-22, 002-23, 002-24: with the documented defaults, and an unknown option by name."""
    fake_sglang.install(monkeypatch)
    specific = {"tp_size": 2, "context_length": 2048, "options": {"dtype": "bfloat16"}}
    config = BackendConfig.from_dict({"backend_type": "sglang", "model_name": "m", "backend_specific": specific})
    assert config.backend_config == SGLangBackendConfig(2, None, 2048, {"dtype": "bfloat16"})
    made = create_backend(config)
    made.load()
    options = fake_sglang.Engine.made[-1].server_args
    assert (options.model_path, options.tp_size, options.mem_fraction_static) == ("m", 2, 0.85)
    assert (options.context_length, options.dtype) == (2048, "bfloat16")
    assert (made.encode("ab"), made.decode([97, 98]), made.generate("a", max_length=2)) == ([97, 98], "ab", " 0 1")
    assert made.get_logprobs("a", "bc").tolist() == [-98.0, -99.0]
    row = np.array([-1.0 / (1 + token) for token in range(fake_sglang.VOCAB_SIZE)])  # its log probabilities, unscaled
    for heat in (1.0, 0.5):
        expected = np.exp(row / heat) / np.exp(row / heat).sum()
        own = made.get_probabilities("a", "bc", temperature=heat)
        np.testing.assert_allclose(own[1][:50], expected[:50], rtol=1e-4)
        assert own.shape == (2, fake_sglang.VOCAB_SIZE)
    assert made.generate("a", max_length=3, return_probs=True)["probs"].shape == (3, fake_sglang.VOCAB_SIZE)
    assert made.get_probabilities("a", "").shape == (0, fake_sglang.VOCAB_SIZE)
    with pytest.raises(RequestError, match="no logits"):
        made.get_logits("a", "b")
    with pytest.raises(RequestError, match="computes no gradients"):
        made.get_logits("a", "b", compute_gradients=True)
    made.close()
    with pytest.raises(ConfigurationError, match="no option 'dtyp': did you mean 'dtype'"):
        create_backend({"backend_type": "sglang", "backend_specific": {"options": {"dtyp": "half"}}}).load()
    for wrong, words in (({"mem_fraction_static": 1.5}, "a number above 0"), ({"options": {"tp_size": 2}}, "beside")):
        with pytest.raises(ConfigurationError, match=words):
            SGLangBackendConfig(**wrong)  # type: ignore[arg-type]


def test_tensor_parallelism_of_the_snippet_reaches_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """002-22."""
    fake_sglang.install(monkeypatch)
    names = run_snippet(specification.SGLANG_PARALLEL, create_backend=create_backend)
    assert fake_sglang.Engine.made[-1].server_args.tp_size == 2
    names["backend"].close()


def test_an_inference_module_over_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sglang.install(monkeypatch)
    inference = create_module("m", backend="sglang", tp_size=2)
    assert isinstance(inference.backend, SGLangBackend)
    result = inference.generate(["ab", "c"], max_new_tokens=3, return_logprobs=True)
    assert [len(row) for row in result.token_ids] == [len(row) for row in result.logprobs or ()] == [3, 3]
    assert inference.get_logprobs(["ab"], ["cd"]).tolist() == [[-99.0, -100.0]]
    inference.close()


@pytest.mark.usefixtures("_without_vllm")
def test_a_missing_package_is_an_import_error() -> None:
    """002-6, 002-49."""
    with pytest.raises(ImportError, match="pip install vllm") as caught:
        create_backend({"backend_type": "vllm", "model_name": "gpt2"})
    assert isinstance(caught.value, PackageMissing)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(PackageMissing, match="pip install sglang"):
        create_backend({"backend_type": "sglang", "model_name": "gpt2"})


# Generation.


def test_signatures_are_those_of_the_specification() -> None:
    """002-1, 002-29 to 002-34, 002-40, 002-42."""
    expected = {
        "load": {},
        "generate": {
            "prompts": inspect.Parameter.empty,
            "max_length": 100,
            "temperature": 1.0,
            "top_k": None,
            "top_p": None,
            "do_sample": True,
            "stop_strings": None,
            "return_logits": False,
            "return_probs": False,
            "compute_gradients": False,
        },
        "get_logits": {**dict.fromkeys(("prompts", "responses"), inspect.Parameter.empty), "compute_gradients": False},
        "get_probabilities": {
            **dict.fromkeys(("prompts", "responses"), inspect.Parameter.empty),
            "temperature": 1.0,
        },
        "encode": {"text": inspect.Parameter.empty},
        "decode": {"token_ids": inspect.Parameter.empty},
        "get_tokenizer": {},
        "is_loaded": {},
    }
    for name, parameters in expected.items():
        found = inspect.signature(getattr(BaseBackend, name)).parameters.values()
        listed = {each.name: each.default for each in found if each.name != "self" and each.kind != each.VAR_KEYWORD}
        assert listed == parameters, name


def test_prompts_give_texts_of_new_tokens(backend: BaseBackend) -> None:
    """002-29, 002-30, 002-39, 002-48: of as many new tokens, whatever the prompt's length; batches as one by one."""
    texts = backend.generate(PROMPTS, max_length=6, do_sample=False)
    assert texts == [backend.generate(prompt, max_length=6, do_sample=False) for prompt in PROMPTS]
    details = backend.generate(PROMPTS, max_length=6, do_sample=False, return_probs=True)
    assert [len(each["token_ids"]) for each in details] == [6, 6, 6]
    assert [each["text"] for each in details] == texts
    assert [each["finish_reason"] for each in details] == ["length"] * 3
    assert isinstance(backend.generate([PROMPTS[0]], max_length=2), list)


def test_one_prompt_gives_a_text_and_several_give_a_list() -> None:
    """002-39."""
    names = run_snippet(specification.TEXTS)
    assert names["printed"] == [names["response"], names["responses"]]
    assert [type(text) for text in (names["response"], *names["responses"])] == [str] * 3
    names["backend"].close()


def test_the_snippets_of_generation(backend: BaseBackend) -> None:
    """002-31 to 002-35; stop strings end a text and are not part of it."""
    noting = specification.Noting(backend)
    run_snippet(specification.PARAMETERS, backend=noting)
    sampled, greedy, stopped = noting.results
    assert isinstance(sampled, str)
    assert greedy == backend.generate("The answer is", max_length=50, temperature=0)
    assert "\n\n" not in stopped


def test_one_stop_string_is_no_list_of_letters(backend: BaseBackend) -> None:
    """002-35: whatever was generated after it, logits and ids are those of the tokens up to its end."""
    whole = backend.generate(PROMPTS[0], max_length=12, do_sample=False)
    result = backend.generate(PROMPTS[0], 12, do_sample=False, stop_strings="self.", return_logits=True)
    assert "self." in whole
    assert result["text"] == whole.partition("self.")[0]
    assert result["finish_reason"] == "stop"
    assert len(result["logits"]) == len(result["token_ids"])
    assert backend.decode(result["token_ids"]).startswith(result["text"] + "self.")


def test_more_than_the_specification_can_be_asked_for(backend: BaseBackend) -> None:
    """A seed repeats; unknown options are refused; several samples of one prompt are a list."""
    one, other = (backend.generate("x", max_length=8, seed=4) for _ in range(2))
    assert one == other
    assert len(backend.generate("x", max_length=2, num_return_sequences=3)) == 3
    with pytest.raises(TypeError, match="max_new_token"):
        backend.generate("x", max_new_token=3)


def test_the_snippet_of_logits(backend: BaseBackend, model: Any, tokenizer: Any) -> None:
    """002-36, 002-40, 002-42: one row for each generated token, the model's own, equal to a plain forward pass."""
    names = run_snippet(specification.LOGITS, backend=backend)
    result = names["result"]
    ids = tokenizer.encode("The capital of France is")
    expected = model(torch.tensor([ids + result["token_ids"]])).logits[0, len(ids) - 1 : -1]
    assert names["printed"] == [result["text"], (len(result["token_ids"]), expected.shape[-1])]
    np.testing.assert_allclose(result["logits"], expected.detach().numpy(), atol=2e-4)
    assert "probs" not in result
    shape = (len(backend.encode("Paris")), expected.shape[-1])
    assert names["logits"].shape == names["probs"].shape == shape
    np.testing.assert_allclose(names["probs"].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "temperature"), [({"temperature": 0.5, "top_k": 3}, 0.5), ({"do_sample": False}, 1)]
)
def test_probabilities_are_tempered_once(backend: BaseBackend, options: Any, temperature: float) -> None:
    """002-37: of the whole vocabulary, at the temperature of the request; at 1 if it is greedy."""
    result = backend.generate("x = ", max_length=5, return_logits=True, return_probs=True, **options)
    expected = (torch.from_numpy(result["logits"]) / temperature).softmax(-1)
    np.testing.assert_allclose(result["probs"], expected, atol=1e-6)
    assert (result["probs"] > 0).all()


def test_gradients_of_generation(backend: BaseBackend) -> None:
    """002-38, 002-41."""
    names = run_snippet(specification.GRADIENTS, backend=backend)
    assert names["result"]["logprobs"].requires_grad
    assert names["result"]["logprobs"].shape == (len(names["result"]["token_ids"]),)
    assert names["logits"].requires_grad
    both = backend.generate(PROMPTS, max_length=3, return_logits=True, return_probs=True, compute_gradients=True)
    assert all(each[name].requires_grad for each in both for name in ("logits", "probs", "logprobs"))


# Scores.


def test_logits_and_probabilities_equal_a_plain_forward_pass(backend: BaseBackend, model: Any, tokenizer: Any) -> None:
    """002-2, 002-40, 002-42, 002-48: of ragged pairs, without padding."""
    logits = backend.get_logits(PROMPTS, RESPONSES)
    logprobs = backend.get_logprobs(PROMPTS, RESPONSES)
    probabilities = backend.get_probabilities(PROMPTS, RESPONSES, temperature=0.7)
    for index, pair in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = plain_logits(model, tokenizer, *pair).detach()
        targets = torch.tensor(tokenizer.encode(pair[1], add_special_tokens=False))
        chosen = expected.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        np.testing.assert_allclose(logits[index], expected, atol=2e-4)
        np.testing.assert_allclose(logprobs[index], chosen, atol=2e-4)
        np.testing.assert_allclose(probabilities[index], (expected / 0.7).softmax(-1), atol=2e-4)
        assert (logits[index].dtype, probabilities[index].dtype) == (np.float32, np.float32)


def test_gradients_of_logits_are_those_of_a_plain_forward_pass(
    backend: BaseBackend, model: Any, tokenizer: Any
) -> None:
    """002-41."""
    own = backend.get_logits(PROMPTS, RESPONSES, compute_gradients=True)
    plain = [plain_logits(model, tokenizer, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    for rows, expected in zip(own, plain, strict=True):
        torch.testing.assert_close(rows, expected, atol=2e-4, rtol=1e-4)
    module: Any = backend.backend.model  # type: ignore[attr-defined]
    for rows, owner in ((own, module), (plain, model)):
        owner.zero_grad()
        torch.stack([row.log_softmax(-1)[:, 5].sum() for row in rows]).sum().backward()
    for (name, parameter), expected in zip(module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=2e-4, rtol=2e-3, msg=name)
    logprobs = backend.get_logprobs(PROMPTS, RESPONSES, compute_gradients=True)
    np.testing.assert_allclose(logprobs[2].detach(), backend.get_logprobs(PROMPTS[2], RESPONSES[2]), atol=2e-4)


def test_an_empty_response_has_no_rows(backend: BaseBackend) -> None:
    """002-40."""
    vocab = backend.get_logits("x", "y").shape[-1]
    assert backend.get_logits("x", "").shape == backend.get_probabilities("x", "").shape == (0, vocab)
    assert [len(row) for row in backend.get_logprobs(["x", "y"], ["", "z"])] == [0, len(backend.encode("z"))]
    assert backend.get_logits("x", "", compute_gradients=True).shape == (0, vocab)


def test_what_does_not_fit_is_refused(backend: BaseBackend) -> None:
    for call in (backend.get_logits, backend.get_logprobs, backend.get_probabilities):
        with pytest.raises(RequestError, match="1 responses for 2 prompts"):
            call(["x", "y"], ["z"])
    with pytest.raises(RequestError, match="prompts and"):
        backend.get_logits(["x", "y"], ["z"], compute_gradients=True)
    with pytest.raises(RequestError, match="temperature must be a number above 0"):
        backend.get_probabilities("x", "y", temperature=0)


# Tokens.


def test_texts_are_encoded_without_special_tokens(backend: BaseBackend, tokenizer: Any) -> None:
    """002-43 to 002-46; the snippet itself runs in `outside/test_gpt2_tokens.py`, with gpt2's vocabulary."""
    ids = backend.encode("Hello, world!")
    assert ids == tokenizer.encode("Hello, world!", add_special_tokens=False)
    assert backend.decode(ids) == "Hello, world!"
    assert backend.decode([*ids, tokenizer.eos_token_id]) == "Hello, world!"
    assert backend.decode(torch.tensor(ids)) == backend.decode(np.array(ids)) == "Hello, world!"
    assert (backend.encode(""), backend.decode([]), backend.encode([])) == ([], "", [])
    assert backend.get_tokenizer().encode("Hello, world!", add_special_tokens=False) == ids


def test_the_first_call_loads_once_from_any_thread() -> None:
    """002-28, 002-47."""
    made = create_backend(NATIVE)
    assert not made.is_loaded()
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(made.generate("x", max_length=4, do_sample=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts)) == 1
    assert made.is_loaded()
    made.close()


async def test_it_blocks_inside_of_an_event_loop_too(backend: BaseBackend) -> None:
    assert len(backend.encode("Hello")) > 0
    assert isinstance(backend.generate("x", max_length=2), str)


# vLLM.


def test_the_same_program_runs_on_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """002-3, 002-5, 002-19."""
    install(monkeypatch)
    names = run_snippet(specification.SWITCHING, create_backend=create_backend)
    assert isinstance(names["response1"], str)
    assert isinstance(names["response2"], str)
    names["hf_backend"].close()
    names["vllm_backend"].close()


def test_tensor_parallelism_of_the_snippet_reaches_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """002-19."""
    install(monkeypatch)
    names = run_snippet(specification.VLLM_PARALLEL, create_backend=create_backend)
    assert FakeLLM.made[-1].arguments.tensor_parallel_size == 2
    names["backend"].close()


def test_settings_reach_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """002-19, 002-20, 002-21: with the documented defaults, and vLLM's own word for an unknown option."""
    install(monkeypatch)
    specific = {"tensor_parallel_size": 2, "max_model_len": 2048, "options": {"dtype": "bfloat16"}}
    made = create_backend({"backend_type": "vllm", "model_name": "m", "backend_specific": specific})
    made.load()
    arguments = FakeLLM.made[-1].arguments
    assert (arguments.tensor_parallel_size, arguments.gpu_memory_utilization) == (2, 0.9)
    assert (arguments.max_model_len, arguments.dtype, arguments.logprobs_mode) == (2048, "bfloat16", "raw_logits")
    made.close()
    wrong = create_backend({"backend_type": "vllm", "backend_specific": {"options": {"dtyp": "bfloat16"}}})
    with pytest.raises(ConfigurationError, match="no option 'dtyp': did you mean 'dtype'"):
        wrong.load()


def test_vllm_has_logits_and_probabilities_too(vllm: BaseBackend) -> None:
    """002-3, 002-40, 002-42, 002-53."""
    expected = np.array([logits_after(ord(token)) for token in "ab"], np.float32)
    probabilities = torch.from_numpy(expected).softmax(-1).numpy()
    np.testing.assert_array_equal(vllm.get_logits("a", "bc"), expected)
    np.testing.assert_allclose(vllm.get_probabilities("a", "bc"), probabilities, rtol=1e-5)
    np.testing.assert_allclose(
        vllm.get_logprobs("a", "bc"), np.log(probabilities[[0, 1], [ord("b"), ord("c")]]), rtol=1e-5
    )
    result = vllm.generate("a", max_length=3, return_logits=True, return_probs=True)
    assert result["logits"].shape == result["probs"].shape == (3, VOCAB_SIZE)
    assert (vllm.encode("ab"), vllm.decode([97, 98])) == ([97, 98], "ab")
    assert vllm.get_tokenizer() is not None


def test_vllm_has_no_gradients(vllm: BaseBackend) -> None:
    """002-38, 002-41."""
    for call in (
        lambda: vllm.get_logits("a", "b", compute_gradients=True),
        lambda: vllm.generate("a", compute_gradients=True),
    ):
        with pytest.raises(RequestError, match="computes no gradients: use the huggingface backend"):
            call()


# vLLM behind the `InferenceModule` of specification 000.


def test_an_inference_module_over_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """000-10, 000-14, 000-18."""
    install(monkeypatch)
    names = run_snippet(
        """
inference = InferenceModule(
    "meta-llama/Llama-2-70b-hf",
    backend="vllm",
    tensor_parallel_size=4,
    gpu_memory_utilization=0.9
)
""",
        InferenceModule=InferenceModule,
    )
    inference = names["inference"]
    assert isinstance(inference.backend, VLLMBackend)
    result = inference.generate(["ab", "c"], max_new_tokens=3, return_logprobs=True)
    assert [len(row) for row in result.token_ids] == [len(row) for row in result.logprobs] == [3, 3]
    assert inference.get_logprobs(["ab"], ["cd"]).tolist() == [[-99.0, -100.0]]
    with pytest.raises(RequestError, match="logprobs_mode"):
        inference.get_logits(["ab"], ["cd"])
    assert inference.backend.tokenizer is not None
    inference.close()


def test_an_engine_with_logits_scores_for_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """000-10."""
    install(monkeypatch)
    inference = create_module("m", backend="vllm", logprobs_mode="raw_logits")
    result = inference.generate("ab", max_new_tokens=2, return_logits=True, return_logprobs=True)
    assert result.logits is not None
    assert result.logprobs is not None
    rows = torch.from_numpy(result.logits[0]).log_softmax(-1)
    np.testing.assert_allclose(result.logprobs[0], rows[[0, 1], result.token_ids[0]], rtol=1e-5)
    inference.close()


def test_auto_is_vllm_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """000-24: with vLLM and a GPU, for a model by name, unless a setting is this engine's."""
    install(monkeypatch)
    monkeypatch.setattr("penstock.training.tensors.has_gpu", lambda: True)
    best = training_vllm.best_backend
    assert best("m", ["tensor_parallel_size", "dtype"]) == "vllm"
    assert [best("m", ["device"]), best(None, []), best(object(), [])] == ["huggingface"] * 3
    inference = create_module("m", cache_size=3)
    assert isinstance(inference.backend, VLLMBackend)
    inference.close()
    monkeypatch.setattr("penstock.training.tensors.has_gpu", lambda: False)
    assert best("m", []) == "huggingface"


def test_every_type_has_its_settings() -> None:
    """002-26, 002-27."""
    for name, kind in BACKEND_TYPES.items():
        assert isinstance(BackendConfig(name).backend_config, kind)

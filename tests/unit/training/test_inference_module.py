"""`InferenceModule` over the native engine with the shipped model, against plain forward passes of its own module."""

from __future__ import annotations

import asyncio
import copy
import statistics
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from penstock import (
    ConfigurationError,
    EngineStateError,
    GenerationResult,
    HuggingFaceBackend,
    InferenceBackend,
    InferenceModule,
    RequestError,
    SamplingParams,
    create_inference_module,
)
from penstock.demo import MODEL_DIR
from tests.tiny_models import build
from tests.tokenizers_for_tests import byte_level

PROMPTS = ["def close(self):", "import os\n\nclass Reader:\n    def __init__(self", "x"]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def inference() -> Iterator[InferenceModule]:
    module = InferenceModule(MODEL_DIR, dtype="float32")
    yield module
    module.close()


@pytest.fixture(autouse=True)
def starts_empty(request: pytest.FixtureRequest) -> None:
    if "inference" in request.fixturenames:
        request.getfixturevalue("inference").clear_cache()


def plain_logits(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """What transformers gives for one unpadded row, [response, vocab]."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


def test_the_size_of_the_queue_may_have_its_name_of_vllm() -> None:
    """It was refused as given twice, because the default of the backend has this engine's name."""
    module = InferenceModule(build("llama"), skip_tokenizer_init=True, max_num_queued_reqs=50)
    assert module.backend.engine.config.max_queue_size == 50
    module.close()


class CountingBackend(InferenceBackend):
    """Returns the number of the call, and has a version that tests can set."""

    def __init__(self) -> None:
        self.calls = 0
        self.version = 0
        self.on_generate: Callable[[], None] = lambda: None

    def generate(self, prompts: Any, **options: Any) -> GenerationResult:
        self.calls += 1
        self.on_generate()
        return GenerationResult([str(self.calls)], [[self.calls]], [np.float32([self.calls])])

    def get_logits(self, prompts: Any, responses: Any, *, return_mask: bool = False) -> Any:
        raise NotImplementedError

    get_logprobs = get_logits

    @property
    def weight_version(self) -> int:
        return self.version


def texts(module: InferenceModule, *prompts: Any, **options: Any) -> list[str]:
    return [module.generate(prompt, **options).texts[0] for prompt in prompts]


# Generation.


def test_batch_equals_one_prompt_at_a_time(inference: InferenceModule) -> None:
    """B0-1: an earlier implementation padded on the right and went on from the padding."""
    batch = inference.generate(PROMPTS, use_cache=False, **GREEDY)
    assert batch.texts == texts(inference, *PROMPTS, use_cache=False, **GREEDY)
    ids = torch.tensor([batch.metadata["prompt_token_ids"][1]])
    expected = inference.backend.model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert batch.token_ids[1] == expected[0, ids.shape[1] :].tolist()


def test_rows_end_where_the_model_ends_them(inference: InferenceModule) -> None:
    """B0-2: rows had a tail of padding."""
    result = inference.generate(PROMPTS[:2], max_new_tokens=9, temperature=0, logit_bias={2: 100.0}, min_tokens=3)
    assert [ids[3:] for ids in result.token_ids] == [[2], [2]]
    assert result.metadata["finish_reasons"] == ["stop", "stop"]
    assert result.lengths == [4, 4]


def test_logprobs_and_logits_are_the_models_own_for_each_generated_token(inference: InferenceModule) -> None:
    """B0-3, B0-4: log probabilities were sliced twice, and "logits" were scores after temperature and filters."""
    result = inference.generate(
        PROMPTS, max_new_tokens=7, temperature=0.5, top_k=5, seed=3, return_logits=True, return_logprobs=True
    )
    assert result.logits is not None
    assert result.logprobs is not None
    for row, prompt in enumerate(result.metadata["prompt_token_ids"]):
        expected = plain_logits(inference.backend.model, prompt, result.token_ids[row])
        logits, logprobs = result.logits[row], result.logprobs[row]
        assert (logits.dtype, logprobs.dtype) == (np.float32, np.float32)
        assert (logits.shape, logprobs.shape) == ((7, 4096), (7,))
        assert np.isfinite(logits).all()
        assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)
        chosen = expected.log_softmax(-1)[range(7), result.token_ids[row]]
        assert torch.allclose(torch.from_numpy(logprobs), chosen, atol=1e-5)
    for logits, ids, sampled in zip(result.logits, result.token_ids, result.metadata["sampled_logprobs"], strict=True):
        scaled = torch.from_numpy(logits) / 0.5
        kept = scaled.masked_fill(scaled < scaled.topk(5).values[:, -1:], -torch.inf)
        assert torch.allclose(torch.from_numpy(sampled), kept.log_softmax(-1)[range(7), ids], atol=1e-5)


def test_greedy_has_three_spellings(inference: InferenceModule) -> None:
    """B0-5, B0-6: temperature 0 raised in one backend, `do_sample=False` in another."""
    spellings = [{"temperature": 0}, {"do_sample": False}, {"top_k": 1}]
    assert len({inference.generate("def f", max_new_tokens=8, **s).texts[0] for s in spellings}) == 1  # type: ignore[arg-type]


def test_samples_of_a_prompt_stand_together(inference: InferenceModule) -> None:
    result = inference.generate(PROMPTS[:2], num_return_sequences=3, max_new_tokens=5, seed=1)
    prompt_ids = result.metadata["prompt_token_ids"]
    assert len(result) == 6
    assert prompt_ids[0] == prompt_ids[2] != prompt_ids[3]
    assert len({tuple(ids) for ids in result.token_ids[:3]}) == 3


def test_equal_prompts_of_one_call_are_sampled_independently(inference: InferenceModule) -> None:
    for seed in (None, 7):
        result = inference.generate(["def f"] * 4, max_new_tokens=8, seed=seed)
        assert len({tuple(ids) for ids in result.token_ids}) == 4
    first = inference.generate("def f", max_new_tokens=8, seed=7)
    assert result.token_ids[0] == first.token_ids[0]


def test_prompts_may_be_ids_and_chats(inference: InferenceModule) -> None:
    chat = [{"role": "user", "content": "Write close."}]
    [ids] = inference.generate(chat, **GREEDY).metadata["prompt_token_ids"]
    assert inference.backend.tokenizer.decode(ids).startswith("<|im_start|>user\nWrite close.<|im_end|>")
    assert texts(inference, ids, **GREEDY) == texts(inference, chat, **GREEDY)


def test_unknown_options_and_wrong_values_are_refused(inference: InferenceModule) -> None:
    for name, known in (("min_token", "min_tokens"), ("max_new_token", "max_new_tokens"), ("do_samples", "do_sample")):
        with pytest.raises(TypeError, match=f"generate has no parameter '{name}': did you mean '{known}'"):
            inference.generate("x", **{name: 3})
    for name, known in (("max_tokens", "max_new_tokens"), ("n", "num_return_sequences")):  # raised `KeyError`
        with pytest.raises(TypeError, match=f"no parameter '{name}': its name is '{known}'"):
            inference.generate("x", **{name: 2})
    with pytest.raises(RequestError, match="temperature"):
        inference.generate("x", temperature=-1)
    with pytest.raises(RequestError, match="empty"):
        inference.generate("")


def test_one_prompt_that_is_refused_cancels_its_batch(inference: InferenceModule) -> None:
    with pytest.raises(RequestError):
        inference.generate(["x", [1 << 30]], max_new_tokens=500, ignore_eos=True)
    assert inference.generate("x", **GREEDY).lengths == [12]


def test_async_twin_returns_the_same_and_streams_stay_available(inference: InferenceModule) -> None:
    async def both() -> tuple[GenerationResult, str]:
        scores = await asyncio.gather(inference.aget_logits("x", "y"), inference.aget_logprobs("x", "y"))
        assert torch.allclose(scores[0], inference.get_logits("x", "y"), atol=1e-4)
        assert torch.allclose(scores[1], inference.get_logprobs("x", "y"), atol=1e-4)
        result = await inference.agenerate("def f", use_cache=False, max_new_tokens=6, temperature=0)
        params = SamplingParams(temperature=0, max_tokens=6)
        return result, "".join([delta.text async for delta in inference.backend.engine.generate("def f", params)])

    result, streamed = asyncio.run(both())
    assert result.texts == [streamed] == texts(inference, "def f", max_new_tokens=6, temperature=0)


def test_cached_results_are_returned_in_less_than_a_millisecond(inference: InferenceModule) -> None:
    first = inference.generate("Hello", **GREEDY)
    seconds = []
    for _ in range(21):
        start = perf_counter()
        result = inference.generate("Hello", **GREEDY)
        seconds.append(perf_counter() - start)
    assert (result.texts, result.token_ids) == (first.texts, first.token_ids)
    assert inference.generation_cache.num_hits >= 21
    assert min(seconds) < 0.001


def test_threads_share_one_batch(inference: InferenceModule) -> None:
    """Row 000-48: 32 rollouts at once through one module."""
    prompts = [f"def function_{number}(" for number in range(32)]
    barrier = threading.Barrier(32)

    def generate(prompt: str) -> tuple[list[int], Any]:
        barrier.wait()
        result = inference.generate(prompt, use_cache=False, max_new_tokens=40, ignore_eos=True, return_logprobs=True)
        assert result.logprobs is not None
        return result.token_ids[0], result.logprobs[0]

    with ThreadPoolExecutor(32) as pool:
        rows = list(pool.map(generate, prompts))
    assert inference.backend.engine.get_stats()["performance_metrics"]["batch_size"]["max"] > 1
    expected = inference.get_logprobs(prompts, [ids for ids, _ in rows])
    assert torch.allclose(torch.tensor(np.stack([logprobs for _, logprobs in rows])), expected, atol=1e-4)


# Scores of given responses.


def test_scores_are_those_of_the_response_alone(inference: InferenceModule) -> None:
    """B0-18, B0-19: shapes covered the prompt and the padding, and the text was encoded as a whole."""
    result = inference.generate(PROMPTS, max_new_tokens=9, seed=5)
    responses = [ids[: 3 * row + 1] for row, ids in enumerate(result.token_ids)]
    logits, mask = inference.get_logits(PROMPTS, responses, return_mask=True)
    logprobs = inference.get_logprobs(PROMPTS, responses)
    assert (logits.shape, logprobs.shape, logits.dtype) == ((3, 7, 4096), (3, 7), torch.float32)
    assert mask.sum(1).tolist() == [1, 4, 7]
    assert (logits[~mask] == 0).all()
    assert (logprobs[~mask] == 0).all()
    for row, prompt in enumerate(result.metadata["prompt_token_ids"]):
        expected = plain_logits(inference.backend.model, prompt, responses[row])
        assert torch.allclose(logits[row, mask[row]], expected, atol=1e-5)
        chosen = expected.log_softmax(-1)[range(len(responses[row])), responses[row]]
        assert torch.allclose(logprobs[row, mask[row]], chosen, atol=1e-5)


def test_scores_ignore_dropout_and_leave_the_owners_mode(inference: InferenceModule) -> None:
    model = build("gpt2")
    model.config.attn_pdrop = model.config.resid_pdrop = 0.5
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    tokenizer = byte_level()
    module = InferenceModule(model.train(), tokenizer=tokenizer, max_sequence_length=64)
    try:
        logits = module.get_logits([[5, 6, 7]], [[8, 9]])
        logprobs = module.get_logprobs([[5, 6, 7]], [[8, 9]])
        assert model.training
        expected = plain_logits(model.eval(), [5, 6, 7], [8, 9])
        assert torch.allclose(logits[0], expected, atol=1e-5)
        assert torch.allclose(logprobs[0], expected.log_softmax(-1)[[0, 1], [8, 9]], atol=1e-5)
        assert module.backend.model is model
    finally:
        module.close()


def test_responses_may_be_texts_ids_or_empty(inference: InferenceModule) -> None:
    tokenizer = inference.backend.tokenizer
    ids = tokenizer.encode(" return None", add_special_tokens=False)
    by_text = inference.get_logprobs("def f():", " return None")
    by_ids = inference.get_logprobs("def f():", ids)
    assert torch.allclose(by_text, by_ids, atol=1e-4)
    assert by_text.shape == (1, len(ids))
    values, mask = inference.get_logprobs(["def f():"] * 2, ["", " return None"], return_mask=True)
    assert torch.allclose(values[1], by_text[0], atol=1e-4)
    assert mask.sum(1).tolist() == [0, len(ids)]
    with pytest.raises(RequestError, match="1 responses for 2 prompts"):
        inference.get_logits(["a", "b"], ["c"])


# The cache of responses.


def test_only_repeatable_calls_are_cached_unless_asked() -> None:
    """B0-15: samples were cached, so each "sample" of a prompt was the same."""
    module = InferenceModule(backend=CountingBackend())
    assert texts(module, "a", "a") == ["1", "2"]
    assert texts(module, "a", "a", use_cache=True) == ["3", "3"]
    assert texts(module, "a", "a", temperature=0) == ["4", "4"]
    assert texts(module, "a", "a", do_sample=False) == ["5", "5"]
    assert texts(module, "a", "a", seed=1) == ["6", "6"]
    assert texts(module, "a", seed=1, use_cache=False) == ["7"]
    assert texts(InferenceModule(backend=CountingBackend(), cache_size=10), "a", "a") == ["1", "1"]


def test_keys_are_structures() -> None:
    """B0-14: `"a|||b"` and `["a", "b"]` had one key."""
    module = InferenceModule(backend=CountingBackend())
    prompts = ["a|||b", ["a", "b"], ["a|||b", "c"], [1, 2], [[1, 2], [3]], [{"role": "user", "content": "a"}]]
    assert texts(module, *prompts, temperature=0) == ["1", "2", "3", "4", "5", "6"]
    assert texts(module, "a|||b", temperature=0.0, max_new_tokens=3) == ["7"]
    assert texts(module, *prompts, temperature=0) == ["1", "2", "3", "4", "5", "6"]
    processors = {"logits_processors": [lambda ids, row: row]}
    assert texts(module, "a", "a", temperature=0, **processors) == ["8", "9"]


def test_cache_drops_the_least_recently_used() -> None:
    """B0-16."""
    module = InferenceModule(backend=CountingBackend(), cache_size=2)
    assert texts(module, "1", "2", "1", "3", "1", "2") == ["1", "2", "1", "3", "1", "4"]


def test_a_call_inside_of_its_caller_s_update_is_refused() -> None:
    """It waited for ever, for the end of its own block."""
    inference = InferenceModule(build("llama"), skip_tokenizer_init=True)
    with inference.updating():
        calls: list[Callable[[Any], object]] = [inference.generate, lambda ids: inference.get_logprobs(ids, [[7]])]
        for call in calls:
            with pytest.raises(EngineStateError, match="after the block"):
                call([[5, 6]])
    assert len(inference.generate([[5, 6]], max_new_tokens=2)) == 1
    inference.close()


def test_results_of_other_weights_are_not_returned() -> None:
    """B0-17."""
    backend = CountingBackend()
    module = InferenceModule(backend=backend)
    assert texts(module, "a", "a", seed=1) == ["1", "1"]
    backend.version = 1
    assert texts(module, "a", "a", seed=1) == ["2", "2"]

    def update() -> None:
        backend.version = 2

    backend.on_generate = update
    assert texts(module, "b", seed=1) == ["3"]
    assert texts(module, "b", "b", seed=1) == ["4", "4"]
    module.clear_cache()
    assert texts(module, "b", seed=1) == ["5"]


def test_backend_without_updates_says_so() -> None:
    with pytest.raises(RequestError, match="cannot be changed in place"):
        InferenceModule(backend=CountingBackend()).updating()


def test_caller_may_change_a_result() -> None:
    """B0-17: the stored object itself was returned."""
    module = InferenceModule(backend=CountingBackend())
    for _ in range(3):
        result = module.generate("a", seed=1)
        assert result.logprobs is not None
        assert (result.texts, result.token_ids, result.logprobs[0].tolist()) == (["1"], [[1]], [1.0])
        result.texts[0] = "changed"
        result.token_ids[0].append(5)
        result.logprobs[0][0] = 9


def test_results_with_logits_are_not_kept(inference: InferenceModule) -> None:
    inference.generate("x", temperature=0, max_new_tokens=2, return_logits=True)
    assert len(inference.generation_cache) == 0


@pytest.mark.parametrize("in_block", [True, False])
def test_changed_weights_take_effect_after_the_block_or_clear_cache(in_block: bool) -> None:
    model = build("llama")
    module = InferenceModule(model, tokenizer=byte_level(), max_sequence_length=128)
    fresh = None
    try:
        prompt = list(range(4, 68))
        before = module.generate([prompt], return_logprobs=True, **GREEDY)
        with module.updating() if in_block else nullcontext(), torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        if not in_block:
            module.clear_cache()
        after = module.generate([prompt], return_logprobs=True, **GREEDY)
        fresh = InferenceModule(model, tokenizer=byte_level(), max_sequence_length=128)
        expected = fresh.generate([prompt], return_logprobs=True, **GREEDY)
        assert after.logprobs is not None
        assert expected.logprobs is not None
        assert after.token_ids == expected.token_ids
        assert np.array_equal(after.logprobs[0], expected.logprobs[0])
        assert after.metadata["weight_versions"] == [[int(in_block)] * 12]
        assert before.logprobs is not None
        assert not np.array_equal(before.logprobs[0], after.logprobs[0])
    finally:
        module.close()
        if fresh is not None:
            fresh.close()


# Construction.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, "there is no backend 'tensorrt': use 'huggingface'"),
        ({"dtype": "float7"}, "dtype 'float7' is unknown: use auto, float32, fp32"),
        ({"device": "tpu7"}, "device 'tpu7' is unknown"),
        ({"device": "cuda:99"}, "is not there"),
        ({"model_name": "/nowhere/at/all"}, "there is no model folder"),
        ({"model_name": 3}, "a model cannot be 3"),
        ({"tensor_paralel_size": 2}, "unknown setting 'tensor_paralel_size'"),
        *(({name: "m"}, f"unknown setting '{name}': did you mean 'model_name'") for name in ("model", "modle_name")),
        ({"modle": "m"}, "did you mean 'model_name'"),
        ({"cach_size": 3}, "did you mean 'cache_size'"),
        ({"model": "m", "backend": "vllm"}, "did you mean 'model_name'"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        create_inference_module(**arguments)


def test_an_instance_of_a_backend_takes_no_settings() -> None:
    with pytest.raises(ConfigurationError, match="takes no model and no settings"):
        create_inference_module(backend=CountingBackend(), dtype="float32")


def test_format_of_tool_calls_must_be_known() -> None:
    with pytest.raises(ValueError, match="yaml"):
        InferenceModule(backend=CountingBackend(), tool_parser="yaml")
    with pytest.raises(ValueError, match="cache_size"):
        InferenceModule(backend=CountingBackend(), cache_size=-1)


def test_tokenizer_may_be_named_or_passed(inference: InferenceModule) -> None:
    for tokenizer in (str(MODEL_DIR), inference.backend.tokenizer):
        module = InferenceModule(MODEL_DIR, tokenizer=tokenizer)
        assert module.backend.tokenizer.encode("def f") == inference.backend.tokenizer.encode("def f")
        module.close()


def test_live_module_stays_where_it_is() -> None:
    with pytest.raises(ConfigurationError, match="stays on its device"):
        HuggingFaceBackend(build("llama"), dtype="float32", tokenizer=byte_level())


def test_repeated_calls_take_a_fraction_of_the_first(inference: InferenceModule) -> None:
    start = perf_counter()
    inference.generate("Hello", max_new_tokens=50, temperature=0)
    first = perf_counter() - start
    repeated = []
    for _ in range(11):
        start = perf_counter()
        inference.generate("Hello", max_new_tokens=50, temperature=0)
        repeated.append(perf_counter() - start)
    assert statistics.median(repeated) < first / 5


# Adapters.


def random_adapter(base: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def test_results_and_scores_of_an_adapter_are_its_own_and_are_cached_until_it_is_loaded_again() -> None:
    base = build("llama")
    first, second = (random_adapter(base, seed) for seed in (1, 2))
    module = InferenceModule(base, skip_tokenizer_init=True, tokenizer=byte_level())
    prompt, greedy = [5, 6, 7, 8], {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    plain = module.generate(prompt, **greedy).token_ids
    for adapter in (first, second):
        module.load_adapter("policy", adapter)
        result = module.generate(prompt, adapter="policy", return_logprobs=True, **greedy)
        assert result.token_ids != plain
        num_hits = module.generation_cache.num_hits
        again = module.generate(prompt, adapter="policy", return_logprobs=True, **greedy)
        assert again.token_ids == result.token_ids
        assert module.generation_cache.num_hits == num_hits + 1
        own = plain_logits(adapter, prompt, result.token_ids[0])
        logits = module.get_logits([prompt], result.token_ids, adapter="policy")
        assert torch.allclose(logits[0], own, atol=1e-4)
        logprobs = module.get_logprobs([prompt], result.token_ids, adapter="policy")
        assert torch.allclose(logprobs[0], own.log_softmax(-1)[range(8), result.token_ids[0]], atol=1e-4)
        assert result.logprobs is not None
        assert np.allclose(result.logprobs[0], logprobs[0], atol=1e-5)
    module.unload_adapter("policy")
    with pytest.raises(RequestError, match="not loaded"):
        module.generate(prompt, adapter="policy", **greedy)
    module.close()


def test_a_backend_without_adapters_says_so() -> None:
    module = InferenceModule(backend=CountingBackend())
    with pytest.raises(RequestError, match="huggingface"):
        module.load_adapter("policy", "/nowhere")
    with pytest.raises(RequestError, match="huggingface"):
        module.unload_adapter("policy")

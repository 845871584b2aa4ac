"""The snippets of the specification of `InferenceModule` run as they are written, but for import lines and models.

Numbers like 000-17 in the docstrings are rows of the requirements checklist. What the snippets leave to the reader
(prompts, environments, a trainer) stands in the names that they get.
"""

from __future__ import annotations

import asyncio
import inspect
import py_compile
import statistics
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import penstock
from penstock import (
    ConfigurationError,
    GenerationResult,
    HuggingFaceBackend,
    InferenceBackend,
    InferenceModule,
    RequestError,
    RequestTooLarge,
    StructuredOutputs,
    ToolCall,
    ToolCallParser,
    create_inference_module,
)
from penstock.demo import MODEL_DIR
from penstock.tools import constraint, read_tools

MODEL = str(MODEL_DIR)
PROMPTS = ["def close(self):", "import os\n\nclass Reader:\n    def __init__(self"]
TOOLS = [{"name": "search", "description": "Search the web", "parameters": {"query": "string"}}]


@pytest.fixture(scope="module")
def inference() -> Iterator[InferenceModule]:
    module = BriefModule(MODEL)
    yield module
    module.close()


class BriefModule(InferenceModule):
    """Generates few tokens where a snippet names no number, so that its test is quick."""

    def generate(self, prompts: Any, use_cache: bool | None = None, **options: Any) -> GenerationResult:
        options["max_new_tokens"] = min(options.get("max_new_tokens", 16), 100)
        return super().generate(prompts, use_cache, **options)


def run_snippet(snippet: str, **names: Any) -> dict[str, Any]:
    """Run a snippet over the shipped model, or with other `names`; all names that are then defined."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("gpt2", "meta-llama/Llama-2-7b-hf"):
        snippet = snippet.replace(f'"{name}"', repr(MODEL))
    names = {"InferenceModule": InferenceModule, **names}
    exec(snippet.replace('device="cuda"', f"device={device!r}").replace("rl_primitives", "penstock"), names)
    return names


# Classes, data structures, exports.


def test_names_of_the_specification_are_exported() -> None:
    """000-14."""
    names = run_snippet(
        """
from rl_primitives import (
    InferenceModule,
    InferenceBackend,
    HuggingFaceBackend,
    VLLMBackend,
    GenerationResult,
    ToolCall,
    ToolCallParser,
    create_inference_module,
)
"""
    )
    assert names["InferenceModule"] is InferenceModule
    assert issubclass(HuggingFaceBackend, InferenceBackend)
    assert {"InferenceModule", "create_inference_module", "ToolCallParser"} <= set(penstock.__all__)


def test_generation_result_has_the_five_fields(inference: InferenceModule) -> None:
    """000-1, 000-2, 000-3, 000-6."""
    result = inference.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)
    assert isinstance(result, GenerationResult)
    assert isinstance(result.texts[0], str)
    assert len(result.texts) == len(result.token_ids) == 2
    assert all(isinstance(token, int) for token in result.token_ids[0])
    assert (result.logprobs, result.logits) == (None, None)
    assert result.metadata["finish_reasons"] == ["length", "length"]
    assert result.metadata["prompt_token_ids"][0] == inference.backend.tokenizer.encode(PROMPTS[0])


def test_tool_call_has_its_name_arguments_text_and_positions() -> None:
    """000-7, 000-11, 000-42, 000-43, 000-44; the parsers have tests of their own."""
    text = 'Now: ```json\n{"tool": "search", "args": {"query": "AI news"}}\n``` done'
    [call] = ToolCallParser("json").parse(text)
    assert isinstance(call, ToolCall)
    assert (call.name, call.arguments) == ("search", {"query": "AI news"})
    assert text[call.start_pos : call.end_pos] == call.raw_text
    invoke = "<invoke><tool_name>search</tool_name><parameters><query>x</query></parameters></invoke>"
    for calls in (
        ToolCallParser.parse_json_tool_calls('{"name": "search", "arguments": {"query": "x"}}'),
        ToolCallParser.parse_xml_tool_calls(f"<function_calls>{invoke}</function_calls>"),
        ToolCallParser.parse_function_style_calls('search(query="x")', TOOLS),
    ):
        assert [(call.name, call.arguments) for call in calls] == [("search", {"query": "x"})]


def test_backend_is_abstract() -> None:
    """000-8."""
    assert InferenceBackend.__abstractmethods__ == {"generate", "get_logits", "get_logprobs"}
    with pytest.raises(TypeError):
        InferenceBackend()  # type: ignore[abstract]


def test_backend_has_the_module_itself_and_the_inference_module_its_cache(inference: InferenceModule) -> None:
    """000-9, 000-12, 000-15, 000-16: one copy of the weights, which a trainer may change."""
    model = inference.backend.model
    assert isinstance(model, torch.nn.Module)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(inference.generation_cache) >= 0
    assert isinstance(inference.backend, HuggingFaceBackend)


def test_signatures_are_those_of_the_specification() -> None:
    """000-12, 000-21, 000-28, 000-38."""

    def names(function: Any) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert names(InferenceModule.__init__)[:4] == ["model_name", "backend", "cache_size", "tool_parser"]
    assert names(InferenceModule.generate)[:2] == ["prompts", "use_cache"]
    assert names(InferenceModule.get_logits)[:2] == names(InferenceModule.get_logprobs)[:2] == ["prompts", "responses"]
    assert names(InferenceModule.batch_generate_with_tools)[:3] == ["prompts", "available_tools", "max_new_tokens"]
    assert names(create_inference_module)[:2] == ["model_name", "backend"]
    assert names(HuggingFaceBackend.__init__)[:4] == ["model_name", "device", "dtype", "trust_remote_code"]
    parameters = inspect.signature(HuggingFaceBackend.generate).parameters
    assert {name: parameter.default for name, parameter in list(parameters.items())[2:10]} == {
        "max_new_tokens": 256,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "do_sample": True,
        "num_return_sequences": 1,
        "return_logits": False,
        "return_logprobs": False,
    }


# Constructor and factory.


def test_huggingface_backend_takes_device_and_dtype() -> None:
    """000-17, 000-53."""
    names = run_snippet(
        """
inference = InferenceModule(
    "meta-llama/Llama-2-7b-hf",
    backend="huggingface",
    device="cuda",
    dtype="bfloat16"
)
"""
    )
    module = names["inference"]
    assert {parameter.dtype for parameter in module.backend.model.parameters()} == {torch.bfloat16}
    assert module.generate("Hello", max_new_tokens=3, ignore_eos=True).lengths == [3]
    module.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there_is_refused_with_the_remedy() -> None:
    """000-25, 000-55."""
    with pytest.raises(ConfigurationError, match=r"device 'cuda' is not there.*use \"cpu\""):
        InferenceModule(MODEL, backend="huggingface", device="cuda", dtype="bfloat16")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_dtype_is_that_of_the_module(dtype: Any, expected: torch.dtype) -> None:
    """000-26: unknown names were taken for "auto"."""
    module = create_inference_module(MODEL, device="cpu", dtype=dtype)
    if dtype == "auto":
        expected = next(module.backend.model.parameters()).dtype
    assert next(module.backend.model.parameters()).dtype == expected
    module.close()
    with pytest.raises(ConfigurationError, match="dtype 'float7' is unknown"):
        InferenceModule(MODEL, dtype="float7")


def test_backends_by_name_and_by_choice() -> None:
    """000-13, 000-20, 000-22, 000-24, 000-46."""
    for module in (
        InferenceModule(MODEL),
        create_inference_module(MODEL),
        create_inference_module(MODEL, backend="auto"),
    ):
        assert isinstance(module.backend, HuggingFaceBackend)
        module.close()
    with pytest.raises(ValueError, match="there is no backend 'tensorrt'"):
        InferenceModule(MODEL, backend="tensorrt")


def test_format_of_tool_calls_is_selected() -> None:
    """000-23."""
    for format in ("json", "xml", "function"):
        module = InferenceModule(MODEL, tool_parser=format)
        assert module.tool_format == format
        module.close()


# Methods.


def test_simple_generation(inference: InferenceModule) -> None:
    """000-4, 000-5, 000-27, 000-28, 000-29, 000-32, 000-33."""
    names = run_snippet(
        """
# Simple generation
result = inference.generate("Hello", max_new_tokens=50)

# With logits and logprobs
result = inference.generate(
    prompts,
    max_new_tokens=100,
    temperature=0.8,
    return_logits=True,
    return_logprobs=True
)

# Access results
texts = result.texts
logits = result.logits  # [batch, seq_len, vocab_size]
logprobs = result.logprobs  # [batch, seq_len]
""",
        inference=inference,
        prompts=PROMPTS,
    )
    lengths = names["result"].lengths
    assert len(names["texts"]) == 2
    assert [row.shape for row in names["logits"]] == [(length, 4096) for length in lengths]
    assert [row.shape for row in names["logprobs"]] == [(length,) for length in lengths]
    assert {row.dtype for row in (*names["logits"], *names["logprobs"])} == {np.dtype("float32")}


def test_sampling_follows_top_p_and_top_k(inference: InferenceModule) -> None:
    """000-30, 000-31: -1 is off."""
    greedy = inference.generate(PROMPTS, max_new_tokens=6, temperature=0).token_ids
    assert inference.generate(PROMPTS, max_new_tokens=6, top_k=1).token_ids == greedy
    assert inference.generate(PROMPTS, max_new_tokens=6, top_p=1e-6).token_ids == greedy
    assert inference.generate(PROMPTS, max_new_tokens=6, top_k=-1, seed=1).token_ids != greedy


def test_online_and_offline_inference(inference: InferenceModule) -> None:
    """000-34, 000-35."""

    async def online() -> list[GenerationResult]:
        return await asyncio.gather(*(inference.agenerate(p, max_new_tokens=6, temperature=0) for p in PROMPTS))

    results = asyncio.run(online())
    assert [result.texts[0] for result in results] == [
        inference.generate(prompt, max_new_tokens=6, temperature=0).texts[0] for prompt in PROMPTS
    ]


def test_kl_divergence_of_a_policy_and_its_reference() -> None:
    """000-36, 000-49."""
    policy, reference = InferenceModule(MODEL, dtype="float32"), InferenceModule(MODEL, dtype="float32")
    names: dict[str, Any] = {"policy": policy, "reference": reference, "F": F}
    names |= {"prompts": PROMPTS, "responses": [" return None", "\n        pass"]}
    snippet = """
# Policy and reference models
policy_logits = policy.get_logits(prompts, responses)
ref_logits = reference.get_logits(prompts, responses)

# Compute KL divergence
kl_div = F.kl_div(
    F.log_softmax(policy_logits, dim=-1),
    F.softmax(ref_logits, dim=-1),
    reduction='batchmean'
)
"""
    same = run_snippet(snippet, **names)
    assert same["policy_logits"].shape == same["ref_logits"].shape
    assert same["policy_logits"].shape[::2] == (2, 4096)
    assert same["kl_div"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        policy.backend.model.lm_head.weight.mul_(1.2)
    policy.clear_cache()
    assert run_snippet(snippet, **names)["kl_div"].item() > 1e-3
    policy.close()
    reference.close()


def test_policy_gradient_loss(inference: InferenceModule) -> None:
    """000-37, 000-50: the loss; its gradient has tests of its own."""
    result = inference.generate(PROMPTS, max_new_tokens=8, seed=1)
    names = run_snippet(
        """
# Get log probabilities
logprobs = inference.get_logprobs(prompts, responses)

# Policy gradient loss
advantages = compute_advantages(rewards)
policy_loss = -(logprobs * advantages).mean()
""",
        inference=inference,
        prompts=PROMPTS,
        responses=result.token_ids,
        rewards=torch.tensor([1.0, 0.0]),
        compute_advantages=lambda rewards: (rewards - rewards.mean())[:, None],
    )
    logprobs = names["logprobs"]
    assert logprobs.shape == (2, 8)
    assert names["policy_loss"].item() == pytest.approx(-(logprobs[0].sum() - logprobs[1].sum()).item() / 32, abs=1e-6)


def test_tools_are_told_to_the_model_and_its_calls_are_read(inference: InferenceModule) -> None:
    """000-38, 000-39, 000-40, 000-41."""
    names = run_snippet(
        """
tools = [
    {
        "name": "search",
        "description": "Search the web",
        "parameters": {"query": "string"}
    }
]

result, tool_calls = inference.batch_generate_with_tools(
    "Search for AI news",
    available_tools=tools
)

# Process tool calls
for tc in tool_calls[0]:
    print(f"Tool: {tc.name}")
    print(f"Arguments: {tc.arguments}")
""",
        inference=inference,
    )
    assert len(names["tool_calls"]) == 1
    prompt = inference.backend.tokenizer.decode(names["result"].metadata["prompt_token_ids"][0])
    assert "Search the web" in prompt
    assert prompt.endswith("<|im_start|>user\nSearch for AI news<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("format", ["json", "xml", "function"])
def test_calls_are_found_in_every_format(format: str) -> None:
    """000-41 to 000-44, with a grammar that makes the small model call."""
    module = InferenceModule(MODEL, tool_parser=format)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    sum_tool = {"name": "add", "parameters": schema}
    required = constraint(read_tools([sum_tool]), "required", format, parallel=False)
    options: dict[str, Any] = {"structured_outputs": required, "max_new_tokens": 80, "temperature": 0}
    result, tool_calls = module.batch_generate_with_tools(["Add.", "Sum."], [sum_tool], **options)
    assert [[call.name for call in calls] for calls in tool_calls] == [["add"], ["add"]]
    assert all(call.arguments["a"] in (1, 2) for calls in tool_calls for call in calls)
    assert module.generate_with_tools("Add.", [sum_tool], **options)[0].texts == result.texts[:1]
    assert [call.name for call in module.parse_tool_calls(result.texts[0])] == ([] if format == "function" else ["add"])
    module.close()


def test_malformed_calls_are_text(inference: InferenceModule) -> None:
    """000-41, 000-55."""
    broken = StructuredOutputs(choice=['{"name": "search", "arguments": {"query": }}'])
    result, tool_calls = inference.batch_generate_with_tools("Search", TOOLS, structured_outputs=broken)
    assert tool_calls == [[]]
    assert result.texts == ['{"name": "search", "arguments": {"query": }}']


def test_cache_returns_the_second_call_at_once(inference: InferenceModule) -> None:
    """000-19, 000-34, 000-45, 000-51: passing `cache_size` asks for samples to be cached too."""
    started: list[float] = []
    names = run_snippet(
        """
# Enable caching (default: 1000 items)
inference = InferenceModule("gpt2", cache_size=5000)

# First call: generates
result1 = inference.generate("Hello")  # ~200ms

# Second call: cached
clock()
result2 = inference.generate("Hello")  # ~1ms
clock()

# Clear cache when needed
""",
        clock=lambda: started.append(perf_counter()),
    )
    module = names["inference"]
    assert module.generation_cache.max_size == 5000
    assert inference.generation_cache.max_size == 1000
    assert names["result1"].token_ids == names["result2"].token_ids
    seconds = []
    for _ in range(21):
        start = perf_counter()
        module.generate("Hello")
        seconds.append(perf_counter() - start)
    assert min(seconds) < 0.001
    run_snippet("inference.clear_cache()", inference=module)
    assert len(module.generation_cache) == 0
    assert module.generate("Hello").token_ids != names["result1"].token_ids
    module.close()


def test_cache_is_a_true_lru(inference: InferenceModule) -> None:
    """000-52."""
    module = InferenceModule(backend=inference.backend, cache_size=2)
    first = {prompt: module.generate(prompt, max_new_tokens=8).token_ids for prompt in "ab"}
    assert module.generate("a", max_new_tokens=8).token_ids == first["a"]
    module.generate("c", max_new_tokens=8)
    assert module.generate("a", max_new_tokens=8).token_ids == first["a"]
    assert module.generate("b", max_new_tokens=8).token_ids != first["b"]


# Integration.


class BaseEnvironment:
    def __init__(self, inference: InferenceModule) -> None:
        self.inference = inference


class RolloutManager:
    """Steps an environment on many threads at once."""

    def __init__(self, env: Any, num_parallel: int) -> None:
        self.env = env
        self.num_parallel = num_parallel

    def collect_rollouts(self, min_trajectories: int) -> list[Any]:
        barrier = threading.Barrier(self.num_parallel)

        def step(number: int) -> Any:
            if number < self.num_parallel:
                barrier.wait()
            return self.env.step(SimpleNamespace(prompt=f"def function_{number}(", response=None))

        with ThreadPoolExecutor(self.num_parallel) as pool:
            return list(pool.map(step, range(min_trajectories)))


ENVIRONMENT = """
class MyEnvironment(BaseEnvironment):
    def __init__(self, inference: InferenceModule):
        super().__init__(inference)

    def step(self, state):
        # Use inference for generation
        result = self.inference.generate(state.prompt)
        state.response = result.texts[0]
        return state
"""


def test_environment_steps_with_an_inference_module(inference: InferenceModule) -> None:
    """000-47."""
    names = run_snippet(ENVIRONMENT, BaseEnvironment=BaseEnvironment)
    state = names["MyEnvironment"](inference).step(SimpleNamespace(prompt="def close(self):", response=None))
    assert isinstance(state.response, str)


def test_rollouts_run_in_one_batch() -> None:
    """000-48, 000-60."""
    names = run_snippet(ENVIRONMENT, BaseEnvironment=BaseEnvironment)
    names = run_snippet(
        """
inference = InferenceModule("gpt2")
rollout_manager = RolloutManager(
    env=MyEnvironment(inference),
    num_parallel=32
)

# Collect rollouts
trajectories = rollout_manager.collect_rollouts(min_trajectories=100)
""",
        InferenceModule=BriefModule,
        RolloutManager=RolloutManager,
        MyEnvironment=names["MyEnvironment"],
    )
    assert len(names["trajectories"]) == 100
    assert len({state.response for state in names["trajectories"]}) > 90
    stats = names["inference"].backend.engine.get_stats()
    assert stats["performance_metrics"]["batch_size"]["max"] > 1
    names["inference"].close()


class BackpropModule:
    """Changes the weights in place."""

    def __init__(self, model: torch.nn.Module, ref_model: torch.nn.Module) -> None:
        self.model = model
        self.ref_model = ref_model

    def compute_loss(self, batch: Any, logprobs: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        return -(logprobs * rewards[:, None]).mean()

    def update(self, loss: torch.Tensor) -> None:
        assert torch.isfinite(loss)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.01)


def test_training_loop_with_the_module_of_the_backend() -> None:
    """000-15: the trainer and the engine have one copy of the weights."""
    names = run_snippet(
        """
# Setup
policy_inference = InferenceModule("gpt2", backend="huggingface")
backprop = BackpropModule(
    model=policy_inference.backend.model,
    ref_model=reference_model
)

# Training loop
for batch in dataloader:
    # Generate
    result = policy_inference.generate(batch['prompts'])

    # Get logprobs
    logprobs = policy_inference.get_logprobs(
        batch['prompts'],
        result.texts
    )

    # Compute loss
    loss = backprop.compute_loss(batch, logprobs, rewards)

    # Update
    backprop.update(loss)
""",
        InferenceModule=BriefModule,
        BackpropModule=BackpropModule,
        reference_model=torch.nn.Linear(2, 2),
        dataloader=[{"prompts": PROMPTS}] * 2,
        rewards=torch.tensor([1.0, -1.0]),
    )
    assert names["logprobs"].shape[0] == 2
    assert names["backprop"].model is names["policy_inference"].backend.model
    names["policy_inference"].close()


# Qualities.


def test_errors_are_typed_and_the_module_goes_on(inference: InferenceModule) -> None:
    """000-55."""
    for prompts, options in (("", {}), ("x", {"top_p": 2.0}), ([1 << 30], {}), ("x", {"max_new_tokens": 0})):
        with pytest.raises(RequestError):
            inference.generate(prompts, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestTooLarge):
        inference.backend.generate("x", max_new_tokens=1 << 30)
    assert inference.generate("x", max_new_tokens=2, ignore_eos=True).lengths == [2]


def test_every_public_method_has_a_docstring_and_types() -> None:
    """000-56."""
    for thing in (InferenceModule, InferenceBackend, HuggingFaceBackend, GenerationResult):
        assert thing.__doc__
        for name, member in inspect.getmembers(thing, inspect.isfunction):
            if not name.startswith("_"):
                assert inspect.getdoc(member), f"{thing.__name__}.{name}"
                assert "return" in member.__annotations__


def test_sources_compile(tmp_path: Path) -> None:
    """000-59."""
    for path in (Path(penstock.__file__).parent / "training").glob("*.py"):
        py_compile.compile(str(path), cfile=str(tmp_path / "compiled.pyc"), doraise=True)


def test_importing_needs_only_torch_and_transformers_and_neither_at_once(inference: InferenceModule) -> None:
    """000-63; that importing the package imports neither is tested with the public API."""
    assert type(inference.backend.model).__module__.startswith("transformers.")


def test_future_enhancements_of_the_specification_are_options_of_generate(inference: InferenceModule) -> None:
    """000-66, 000-67, 000-70: beam search, constrained generation, logits processors."""
    beams = inference.generate("def f", use_beam_search=True, best_of=3, temperature=0, max_new_tokens=4)
    assert beams.lengths[0] <= 4
    choice = inference.generate("def f", structured_outputs=StructuredOutputs(choice=["yes", "no"]))
    assert choice.texts[0] in ("yes", "no")
    seen: list[int] = []

    def processor(ids: Any, logits: Any) -> Any:
        seen.append(len(ids))
        return logits

    inference.generate("def f", max_new_tokens=3, ignore_eos=True, logits_processors=[processor])
    assert seen == [0, 1, 2]


def test_quantized_module_is_an_option(inference: InferenceModule) -> None:
    """000-65, 000-72: `quantization` and speculation are settings of the engine."""
    module = InferenceModule(MODEL, quantization="int8", weight_mode="packed")
    assert module.generate("def f", max_new_tokens=4, ignore_eos=True).lengths == [4]
    module.close()
    speculating = InferenceModule(MODEL, enable_speculative_decoding=True)
    greedy = {"temperature": 0, "max_new_tokens": 16}
    assert speculating.generate("x = 1\ny = 1\nz =", **greedy).lengths == [16]
    speculating.close()


def test_median_of_a_cached_call_is_a_fraction_of_the_first(inference: InferenceModule) -> None:
    """000-51."""
    start = perf_counter()
    inference.generate("a cached call", max_new_tokens=64, temperature=0, ignore_eos=True)
    first = perf_counter() - start
    seconds = []
    for _ in range(11):
        start = perf_counter()
        inference.generate("a cached call", max_new_tokens=64, temperature=0, ignore_eos=True)
        seconds.append(perf_counter() - start)
    assert statistics.median(seconds) < first / 5


def test_live_module_needs_its_tokenizer(inference: InferenceModule) -> None:
    """000-15, 000-55."""
    module = InferenceModule(inference.backend.model, tokenizer=inference.backend.tokenizer)
    assert module.backend.model is inference.backend.model
    module.close()
    with pytest.raises(ConfigurationError, match="needs its tokenizer"):
        InferenceModule(inference.backend.model)

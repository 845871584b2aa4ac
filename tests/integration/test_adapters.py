"""LoRA adapters in one batch with the base model: every request gives what peft gives with its adapter alone.

The oracle is peft over plain transformers, one text at a time, in float32.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from penstock import (
    EngineClosed,
    EngineStateError,
    InferenceEngine,
    RequestError,
    RequestHandle,
    SamplingParams,
    ScriptedModel,
    WeightsError,
    WithAdapters,
)
from penstock.kernels.native import available as kernels_available
from tests.held_passes import Served
from tests.tiny_models import build

# Architecture -> the layers that adapters change. In gpt2 they are transposed; there and in phi3 several are one.
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "opt": ["k_proj", "out_proj", "fc1", "fc2"],
}
SHARED: dict[str, Any] = {"weight_mode": "shared"}
PACKED: dict[str, Any] = {"weight_mode": "packed"}
UNFUSED: dict[str, Any] = {"weight_mode": "packed", "disabled_rewrites": ["fused_layers"]}
TORCH: dict[str, Any] = {"weight_mode": "shared", "disabled_rewrites": ["kernels"]}
PATIENCE_S = 60.0
PROMPT = [(7 * i * i + 3 * i) % 150 + 2 for i in range(28)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "num_threads": 1, "batch_timeout_ms": 0, "block_size": 4}


def engine_of(model: nn.Module, **settings: Any) -> InferenceEngine:
    return InferenceEngine(model, **{**OPTIONS, **settings})


def adapted(base: nn.Module, seed: int, targets: list[str], **settings: Any) -> Any:
    """A copy of the base with a random adapter of peft, active."""
    is_transposed = type(base).__name__.startswith("GPT2")
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": is_transposed} | settings
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def own_logprobs(model: Any, ids: list[int], num_scored: int) -> Tensor:
    """The model's log probabilities of the last tokens, float32 [num_scored]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    logprobs = logits[-num_scored - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[-num_scored:])[:, None])[:, 0]


def assert_own(model: Any, output: Any, atol: float = 1e-5) -> None:
    """What was generated are the model's own greedy tokens, with their log probabilities."""
    (completion,) = output.outputs
    ids = [*output.prompt_token_ids, *completion.token_ids]
    own = own_logprobs(model, ids, len(completion.token_ids))
    torch.testing.assert_close(torch.tensor(completion.token_logprobs), own, atol=atol, rtol=0)


async def scores(engine: InferenceEngine, name: str) -> Tensor:
    (score,) = await engine.score([PROMPT[:8]], [PROMPT[8:]], adapter=name)
    return torch.from_numpy(score.logprobs)


@pytest.mark.parametrize("settings", [SHARED, PACKED, UNFUSED, TORCH], ids=["shared", "packed", "unfused", "torch"])
@pytest.mark.parametrize("architecture", TARGETS)
async def test_adapters_in_one_batch_give_what_peft_gives_alone(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = build(architecture)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "patterns": {"rank_pattern": {"0.*": 2}, "alpha_pattern": {TARGETS[architecture][0]: 3}},
        "rslora": {"r": 6, "use_rslora": True},
    }
    models = {name: adapted(base, i, TARGETS[architecture], **kind) for i, (name, kind) in enumerate(kinds.items())}
    async with engine_of(base, **settings) as engine:
        assert isinstance(engine, WithAdapters)
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
            await engine.load_adapter(name, tmp_path / name)
        assert engine.adapters == list(kinds)
        everyone = {"": base} | models
        atol = 1e-5
        outputs = await asyncio.gather(*(engine.generate(PROMPT, GREEDY, adapter=name) for name in everyone))
        for model, output in zip(everyone.values(), outputs, strict=True):
            assert_own(model, output, atol)
        for name, model in everyone.items():
            own = own_logprobs(model, PROMPT, len(PROMPT) - 8)
            torch.testing.assert_close(await scores(engine, name), own, atol=atol, rtol=0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("settings", [SHARED, PACKED, TORCH], ids=["shared", "packed", "torch"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
async def test_an_adapter_may_change_the_output_head(settings: dict[str, Any], tied: bool) -> None:
    """The head sees fewer rows than a layer: those whose logits are needed."""
    base = build("llama", tie_word_embeddings=tied)
    models = {"head": adapted(base, 1, ["lm_head"]), "both": adapted(base, 2, ["q_proj", "lm_head"], r=3)}
    async with engine_of(base, **settings) as engine:
        for name, model in models.items():
            await engine.load_adapter(name, model)
        everyone = {"": base} | models
        outputs = await asyncio.gather(*(engine.generate(PROMPT, GREEDY, adapter=name) for name in everyone))
        for model, output in zip(everyone.values(), outputs, strict=True):
            assert_own(model, output)
        for name, model in everyone.items():
            own = own_logprobs(model, PROMPT, len(PROMPT) - 8)
            torch.testing.assert_close(await scores(engine, name), own, atol=1e-5, rtol=0)


async def test_a_live_module_and_its_folder_are_the_same_adapter(tmp_path: Path) -> None:
    base = build("llama")
    model = adapted(base, 1, ["q_proj", "down_proj"], alpha_pattern={"q_proj": 16})
    model.save_pretrained(tmp_path)
    async with engine_of(base) as engine:
        await engine.load_adapter("live", model)
        await engine.load_adapter("folder", str(tmp_path))
        assert torch.equal(await scores(engine, "live"), await scores(engine, "folder"))


async def test_a_folder_with_the_head_of_the_base_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """peft saves it by default, and the error did not say how to do without."""
    base = build("llama")
    model = adapted(base, 1, ["lm_head"])
    async with engine_of(base) as engine:
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            model.save_pretrained(tmp_path)
        with pytest.raises(WeightsError, match=r"lm_head\.base_layer\.weight.*save_embedding_layers=False"):
            await engine.load_adapter("head", tmp_path)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        await engine.load_adapter("head", tmp_path)
        assert_own(model, await engine.generate(PROMPT, GREEDY, adapter="head"))


async def test_eight_adapters_of_several_ranks_and_layers_run_in_one_batch() -> None:
    base = build("llama")
    subsets = [["q_proj"], ["v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"], TARGETS["llama"]]
    models = {f"a{i}": adapted(base, i, subsets[i % 4], r=1 + i) for i in range(8)}
    async with engine_of(base) as engine:
        for name, model in models.items():
            await engine.load_adapter(name, model)
        names = ["", *models]
        handles = [engine.generate(PROMPT[: 5 + 2 * i], GREEDY, adapter=name) for i, name in enumerate(names)]
        for name, output in zip(names, await asyncio.gather(*handles), strict=True):
            assert_own(models.get(name, base), output)


async def test_t3_the_base_is_bitwise_the_same_after_many_adapters() -> None:
    """Merging an adapter into bf16 weights and taking it out again made them drift."""
    base = build("llama").to(torch.bfloat16)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, 1, TARGETS["llama"])
    async with engine_of(base) as engine:
        expected = await engine.generate(PROMPT, GREEDY)
        for _ in range(20):
            await engine.load_adapter("policy", model)
            await engine.generate(PROMPT, GREEDY, adapter="policy")
        actual = await engine.generate(PROMPT, GREEDY, namespace="cold")
        await engine.unload_adapter("policy")
    assert actual.outputs[0].token_logprobs == expected.outputs[0].token_logprobs
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


async def test_t17_an_adapter_that_is_loaded_again_under_its_name_is_never_stale() -> None:
    """A cached prefix, or a file that was read earlier, answered for the adapter of before."""
    base = build("llama")
    model = adapted(base, 1, TARGETS["llama"])
    async with engine_of(base) as engine:
        for factor in (1.0, -2.0, 0.5):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(factor)
            await engine.load_adapter("policy", model)
            assert_own(model, first := await engine.generate(PROMPT, GREEDY, adapter="policy"))
            assert first.num_cached_tokens == 0
            again = await engine.generate(PROMPT, GREEDY, adapter="policy")
            assert again.num_cached_tokens > 0
            assert_own(model, again)
        assert engine.adapters == ["policy"]


async def test_adapters_and_base_share_no_cached_prefix() -> None:
    base = build("llama")
    async with engine_of(base) as engine:
        await engine.load_adapter("a", adapted(base, 1, ["q_proj"]))
        for name in ("", "a"):
            output = await engine.generate(PROMPT, GREEDY, adapter=name)
            assert output.num_cached_tokens == 0


async def test_a_running_request_keeps_its_generation_when_the_adapter_is_replaced() -> None:
    base = build("llama")
    old, new = adapted(base, 1, TARGETS["llama"]), adapted(base, 2, TARGETS["llama"])
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    async with engine_of(base) as engine:
        await engine.load_adapter("policy", old)
        handle = engine.generate(PROMPT, long, adapter="policy")
        stream = aiter(handle)
        await anext(stream)
        await engine.load_adapter("policy", new)
        assert_own(new, await engine.generate(PROMPT, GREEDY, adapter="policy"))
        assert_own(old, await handle)


async def test_an_unloaded_adapter_is_refused_while_the_requests_that_run_with_it_go_on() -> None:
    base = build("llama")
    models = {name: adapted(base, seed, ["q_proj", "v_proj"]) for seed, name in enumerate("ab")}
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    async with engine_of(base) as engine:
        for name, model in models.items():
            await engine.load_adapter(name, model)
        handles = {name: engine.generate(PROMPT, long, adapter=name) for name in ("", "a", "b")}
        for handle in handles.values():
            await anext(aiter(handle))
        await engine.unload_adapter("a")
        assert engine.adapters == ["b"]
        assert engine.adapter_generation("a") == 0
        with pytest.raises(RequestError, match="'a' is not loaded"):
            await engine.generate(PROMPT, GREEDY, adapter="a")
        with pytest.raises(RequestError, match="'a' is not loaded"):
            await engine.unload_adapter("a")
        assert_own(models["a"], await handles["a"])
        assert_own(base, await handles[""])
        assert_own(models["b"], await handles["b"])


class Awaited(dict[str, Any]):
    """The configurations of a module's adapters, which nobody can look up before a test says so."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.may_be_read = threading.Event()

    def get(self, *arguments: Any) -> Any:
        assert self.may_be_read.wait(PATIENCE_S)
        return super().get(*arguments)


async def test_two_loads_of_one_name_at_once_are_refused_and_of_two_names_are_not() -> None:
    base = build("llama")
    models = [adapted(base, seed, ["q_proj"]) for seed in range(2)]
    models[0].peft_config = configs = Awaited(models[0].peft_config)
    async with engine_of(base) as engine:
        first, second, other = (
            asyncio.create_task(engine.load_adapter(name, model))
            for name, model in (("a", models[0]), ("a", models[1]), ("b", models[1]))
        )
        with pytest.raises(EngineStateError, match="'a' is being loaded"):
            await second
        configs.may_be_read.set()
        await asyncio.gather(first, other)
        assert sorted(engine.adapters) == ["a", "b"]
        assert_own(models[0], await engine.generate(PROMPT, GREEDY, adapter="a"))
        generation = engine.adapter_generation("a")
        await engine.load_adapter("a", models[1])
        assert engine.adapter_generation("a") > generation


@pytest.mark.skipif(not kernels_available(), reason="without kernels a load waits for the end of the step")
@pytest.mark.parametrize("settings", [SHARED, PACKED], ids=["shared", "packed"])
async def test_an_adapter_is_replaced_while_a_step_runs_and_the_next_step_has_it(settings: dict[str, Any]) -> None:
    """A load waited for the end of the running step, which took longer than everything else that it did."""

    def hold(ids: list[int], logits: Tensor) -> Tensor:
        begun.set()
        assert ended.wait(PATIENCE_S)
        return logits

    begun, ended = threading.Event(), threading.Event()
    base = build("llama")
    old, new = (adapted(base, seed, TARGETS["llama"]) for seed in range(2))
    held = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logits_processors=[hold])
    async with engine_of(base, **settings) as engine:
        await engine.load_adapter("a", old)
        running = engine.generate(PROMPT, held, adapter="a")
        await asyncio.to_thread(begun.wait)
        await asyncio.wait_for(engine.load_adapter("a", new), PATIENCE_S / 2)
        replaced = engine.generate(PROMPT, GREEDY, adapter="a")
        ended.set()
        assert_own(new, await replaced)
        assert_own(old, await running)


async def test_a_fork_runs_with_the_adapter_of_its_origin() -> None:
    base = build("llama")
    model = adapted(base, 1, TARGETS["llama"])
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    async with Served(base, kept_outputs=4, **OPTIONS) as served:
        engine = served.engine
        await engine.load_adapter("a", model)
        handle = await served.begin(PROMPT, long, 1, adapter="a")
        (branch,) = handle.fork(1, append=[5, 6, 7])
        served.passes.release()
        assert_own(model, await handle)
        output = await branch
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        num_new = len(output.outputs[0].token_ids) - 3
        own = own_logprobs(model, ids, num_new)
        torch.testing.assert_close(torch.tensor(output.outputs[0].token_logprobs[-num_new:]), own, atol=1e-5, rtol=0)
        with pytest.raises(RequestError, match="no request has finished"):
            await engine.check_logprobs()  # the live module has no adapter: both would seem to differ from it


async def test_adapters_stay_after_an_update_of_the_base() -> None:
    base = build("llama")
    model = adapted(base, 1, ["q_proj", "up_proj"])
    async with engine_of(base) as engine:
        await engine.load_adapter("a", model)
        await engine.generate(PROMPT, GREEDY, adapter="a")
        async with engine.updating():
            with torch.no_grad():
                for changed in (base.lm_head, model.base_model.model.lm_head):
                    changed.weight.mul_(0.5)
        assert_own(model, await engine.generate(PROMPT, GREEDY, adapter="a"))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("is_live", [True, False], ids=["live", "folder"])
async def test_what_is_not_supported_is_refused_by_its_name(
    settings: dict[str, Any], word: str, is_live: bool, tmp_path: Path
) -> None:
    base = build("llama")
    options = {"target_modules": ["q_proj"]} | settings
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(tmp_path)
    async with engine_of(base) as engine:
        with pytest.raises(WeightsError, match=word):
            await engine.load_adapter("a", model if is_live else tmp_path)
        assert engine.adapters == []
        assert_own(base, await engine.generate(PROMPT, GREEDY))


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OTHER = "base_model.model.model.norm.lora_{}.weight"
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # tensors and settings in place of the good ones
    "NaN": ({LAYER: torch.full((4, 32), torch.nan)}, {}, "layers.0.self_attn.q_proj are not finite"),
    "integers": ({LAYER: torch.ones(4, 32, dtype=torch.int32)}, {}, "int32"),
    "half a pair": ({LAYER: None}, {}, "lacks one of the two"),
    "another width": ({LAYER: torch.ones(4, 7)}, {}, "maps 32 numbers to 32"),
    "another rank": ({LAYER: torch.ones(3, 32)}, {}, r"\[3, 32\]"),
    "no layer": ({OTHER.format("A"): torch.ones(2, 32), OTHER.format("B"): torch.ones(32, 2)}, {}, "no linear layer"),
    "no kind of matrix": ({"base_model.model.lm_head.bias": torch.ones(3)}, {}, "lm_head.bias"),
    "alpha without a value": ({}, {"lora_alpha": None}, "lora_alpha=None"),
    "a broken pattern": ({}, {"alpha_pattern": {"(": 1}}, "alpha_pattern"),
    "an infinite scaling": ({}, {"lora_alpha": float("inf")}, "not finite"),
    "another method": ({}, {"peft_type": "IA3"}, "peft_type"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_broken_folder_is_refused_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    tensors, settings, word = BROKEN[case]
    base = build("llama")
    adapted(base, 1, ["q_proj"]).save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    changed = {name: value for name, value in (load_file(weights) | tensors).items() if value is not None}
    save_file(changed, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    async with engine_of(base, **PACKED) as engine:
        with pytest.raises(WeightsError, match=word):
            await engine.load_adapter("a", tmp_path)
        config.write_text("[]")
        with pytest.raises(WeightsError, match="must hold an object"):
            await engine.load_adapter("a", tmp_path)
        weights.write_bytes(b"no tensors")
        with pytest.raises(WeightsError, match="cannot be read"):
            await engine.load_adapter("a", tmp_path)
        assert engine.adapters == []


async def test_a_scaling_that_makes_numbers_infinite_is_refused_without_kernels_too() -> None:
    """Columns of other adapters are multiplied by 0, so these numbers made every row of a step NaN."""
    model = adapted(build("llama"), 1, ["q_proj"], lora_alpha=1e41)
    async with engine_of(build("llama"), **TORCH) as engine:
        with pytest.raises(WeightsError, match="not finite"):
            await engine.load_adapter("a", model)


async def test_an_adapter_of_another_model_changes_nothing() -> None:
    base = build("llama")
    other = adapted(build("llama", hidden_size=64), 1, ["q_proj"])
    async with engine_of(base) as engine:
        await engine.load_adapter("a", good := adapted(base, 1, ["q_proj"]))
        with pytest.raises(WeightsError, match="64"):
            await engine.load_adapter("a", other)
        with pytest.raises(WeightsError, match="cannot be read"):
            await engine.load_adapter("b", "/nowhere")
        with pytest.raises(WeightsError, match="dict"):
            await engine.load_adapter("b", {})
        assert_own(good, await engine.generate(PROMPT, GREEDY, adapter="a"))


async def test_a_module_that_applies_its_own_adapter_takes_others_once_that_is_disabled() -> None:
    base = build("llama")
    model = adapted(base, 1, ["q_proj", "v_proj"])
    async with engine_of(model) as engine:
        with pytest.raises(WeightsError, match="disable_adapter_layers"):
            await engine.load_adapter("a", model)
        model.base_model.disable_adapter_layers()
        assert_own(base, await engine.generate(PROMPT, GREEDY))
        await engine.load_adapter("a", model)
        output = await engine.generate(PROMPT, GREEDY, adapter="a")
    model.base_model.enable_adapter_layers()
    assert_own(model, output)


async def test_a_scripted_model_has_no_adapters() -> None:
    async with InferenceEngine(ScriptedModel([5]), skip_tokenizer_init=True) as engine:
        with pytest.raises(WeightsError, match="takes no adapters"):
            await engine.load_adapter("a", "/nowhere")
        with pytest.raises(RequestError, match="not loaded"):
            await engine.generate([1, 2], adapter="a")


async def test_an_engine_stops_while_requests_run_with_an_adapter_that_was_unloaded() -> None:
    base = build("llama", max_position_embeddings=1 << 16)
    engine = engine_of(base, max_sequence_length=None, kv_cache_tokens=1 << 16)
    await engine.load_adapter("a", adapted(base, 1, ["q_proj"]))
    handle = engine.generate(PROMPT, SamplingParams(max_tokens=60_000, ignore_eos=True), adapter="a")
    await anext(aiter(handle))
    await engine.unload_adapter("a")
    await asyncio.to_thread(engine.stop, 0)
    with pytest.raises(EngineClosed):
        await handle


async def test_requests_of_many_adapters_keep_theirs_while_these_come_and_go() -> None:
    """Requests at random moments, beside adapters that are replaced, unloaded and loaded: each has one generation."""
    base, rng = build("llama"), random.Random(0)
    sources = [adapted(base, seed, TARGETS["llama"][seed % 3 :], r=1 + seed) for seed in range(5)]
    async with engine_of(base, **PACKED, max_batch_size=6) as engine:
        current: dict[str, Any] = {"": base}
        results: list[tuple[Any, RequestHandle]] = []
        for _ in range(60):
            name, source = rng.choice("abc"), rng.choice(sources)
            if rng.random() < 0.3 and name in current:
                await engine.unload_adapter(name)
                del current[name]
            elif rng.random() < 0.6:
                await engine.load_adapter(name, source)
                current[name] = source
            for name in rng.choices(sorted(current), k=2):
                params = SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 24), ignore_eos=True)
                handle = engine.generate(PROMPT[: rng.randint(1, 20)], params, adapter=name)
                await handle.admitted()  # from here on, the generation of the request is fixed
                results.append((current[name], handle))
        for model, handle in results:
            assert_own(model, await handle)

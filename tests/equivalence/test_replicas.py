"""Two replicas on the CPU give what plain transformers gives, whichever replica a request goes to.

With `routing="round_robin"` equal requests go to both replicas.
"""

from __future__ import annotations

import asyncio
import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penstock import (
    ConfigurationError,
    EngineStateError,
    InferenceEngine,
    InferenceModule,
    ReplicatedEngine,
    RequestError,
    RequestOutput,
    SamplingParams,
    WeightsError,
)
from penstock.api.weights import UpdateMode
from penstock.config import EngineConfig
from penstock.engine.replicas.sources import Models
from penstock.models.copies import config_of_replica, copy_of, device_of_replica
from tests.tiny_models import build

SETTINGS: dict[str, Any] = {"kv_cache_tokens": 2048, "max_sequence_length": 256, "verify_model": False}
PROMPTS = [[2 + (7 * i + 3 * j) % 150 for j in range(5 + i)] for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def module_of(seed: int = 0) -> nn.Module:
    module: nn.Module = build("llama").eval()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def replicated(model: object, **settings: Any) -> ReplicatedEngine:
    settings = {"skip_tokenizer_init": True, **SETTINGS, **settings}
    return ReplicatedEngine(model, replicas=2, routing="round_robin", **settings)


def by_transformers(module: nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The greedy continuation of one prompt, and its log probabilities."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        whole = module.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
        logprobs = module(whole).logits[0].float().log_softmax(-1)
    tokens = whole[0, len(prompt) :].tolist()
    return tokens, [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)]


async def generate(engine: ReplicatedEngine | InferenceEngine, params: SamplingParams = GREEDY) -> list[RequestOutput]:
    return list(await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS * 2)))


async def check(engine: ReplicatedEngine, module: nn.Module, version: int) -> None:
    """Every prompt on both replicas, against transformers."""
    before = [replica["num_requests"] for replica in engine.get_stats()["routing"]]
    for prompt, output in zip(PROMPTS * 2, await generate(engine), strict=True):
        tokens, logprobs = by_transformers(module, prompt)
        completion = output.outputs[0]
        assert completion.token_ids == tokens
        np.testing.assert_allclose(completion.token_logprobs, logprobs, atol=1e-5)
        assert set(completion.weight_versions) == {version}
    after = [replica["num_requests"] for replica in engine.get_stats()["routing"]]
    assert [b - a for a, b in zip(before, after, strict=True)] == [6, 6]


def change(module: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


async def test_replicas_of_a_folder_generate_score_and_embed_as_one_engine(tmp_path: Path) -> None:
    module = module_of()
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    sampled = SamplingParams(temperature=0.9, top_p=0.9, n=2, seed=7, max_tokens=6, ignore_eos=True)
    pairs = [prompt[:3] for prompt in PROMPTS], [prompt[3:] for prompt in PROMPTS]
    async with (
        replicated(str(tmp_path), seed=3) as engine,
        InferenceEngine(str(tmp_path), seed=3, skip_tokenizer_init=True, **SETTINGS) as single,
    ):
        await check(engine, module, 0)
        for params in (sampled, SamplingParams(temperature=1.0, max_tokens=6)):
            texts = [[each.token_ids for each in output.outputs] for output in await generate(engine, params)]
            expected = [[each.token_ids for each in output.outputs] for output in await generate(single, params)]
            if params.seed is not None:
                assert texts == expected
        scores, expected_scores = await engine.score(*pairs), await single.score(*pairs)
        for score, expected_score in zip(scores, expected_scores, strict=True):
            np.testing.assert_allclose(score.logprobs, expected_score.logprobs, atol=1e-5)
        embeddings, expected_embeddings = await engine.embed(PROMPTS), await single.embed(PROMPTS)
        for embedding, expected_embedding in zip(embeddings, expected_embeddings, strict=True):
            np.testing.assert_allclose(embedding.embedding, expected_embedding.embedding, atol=1e-5)
        with pytest.raises(ConfigurationError, match="gradients need a live module"):
            await engine.score([PROMPTS[0]], [[5]], requires_grad=True)


@pytest.mark.parametrize("weight_mode", ["shared", "packed"])
async def test_copies_of_a_live_module_follow_its_updates(weight_mode: str) -> None:
    module = module_of()
    async with replicated(module, weight_mode=weight_mode) as engine:
        await check(engine, module, 0)
        async with engine.updating():
            change(module, 1.1)
        await check(engine, module, 1)
        change(module, 0.9)
        assert await engine.update_weights(mode="keep") == 2
        await check(engine, module, 2)
        other = module_of(1)
        await engine.update_weights(other.state_dict(), mode="wait")
        await check(engine, other, 3)
        await check(engine, module, 3)  # it has these weights too


@pytest.mark.parametrize("mode", ["keep", "wait"])
async def test_replicas_take_weights_from_folders_and_iterators(tmp_path: Path, mode: UpdateMode) -> None:
    first, second, third = module_of(), module_of(1), module_of(2)
    for name, module in (("first", first), ("second", second)):
        module.save_pretrained(tmp_path / name)  # type: ignore[operator]
    async with replicated(str(tmp_path / "first")) as engine:
        assert await engine.update_weights(tmp_path / "second", mode=mode) == 1
        await check(engine, second, 1)
        await engine.update_weights(iter(third.state_dict().items()), mode=mode)
        await check(engine, third, 2)


async def test_gradients_go_to_the_module_of_the_owner() -> None:
    module, twin = module_of(), module_of()
    twin.load_state_dict(module.state_dict())
    async with replicated(module) as engine:
        (score,) = await engine.score([PROMPTS[3]], [[5, 6]], requires_grad=True)
        score.logprobs.sum().backward()
    logits = twin(torch.tensor([[*PROMPTS[3], 5, 6]])).logits[0].log_softmax(-1)
    (logits[-3, 5] + logits[-2, 6]).backward()
    for parameter, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-4)


def with_adapter(module: nn.Module, seed: int) -> nn.Module:
    """A copy of a module with a random adapter of peft, active."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(copy.deepcopy(module), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted  # type: ignore[no-any-return]


async def test_adapters_run_on_all_replicas_and_are_never_stale() -> None:
    module = module_of()
    async with replicated(module, weight_mode="shared") as engine:
        for seed in (1, 2):
            adapted = with_adapter(module, seed)
            await engine.load_adapter("a", adapted)
            assert engine.adapters == ["a"]
            outputs = await asyncio.gather(*(engine.generate(prompt, GREEDY, adapter="a") for prompt in PROMPTS * 2))
            for prompt, output in zip(PROMPTS * 2, outputs, strict=True):
                assert output.generated_ids == by_transformers(adapted, prompt)[0]
            await check(engine, module, 0)
        await engine.unload_adapter("a")
        assert engine.adapters == []
        with pytest.raises(RequestError, match="adapter 'a' is not loaded"):
            await engine.generate(PROMPTS[0], GREEDY, adapter="a")
        with pytest.raises(RequestError, match="adapter 'a' is not loaded"):
            await engine.unload_adapter("a")
        with pytest.raises(RequestError, match="an adapter needs a name"):
            await engine.load_adapter("", adapted)
        with pytest.raises(WeightsError):
            await engine.load_adapter("b", "/no/such/folder")
        assert engine.adapters == []


async def test_log_probabilities_of_all_replicas_are_checked_against_the_live_module() -> None:
    module = module_of()
    async with replicated(module, kept_outputs=12) as engine:
        await generate(engine)
        report = await engine.check_logprobs()
        assert (report.num_completions, report.num_tokens) == (12, 96)
        with engine.reading_weights() as version:
            assert version == 0
        async with engine.updating():
            with pytest.raises(EngineStateError, match="are being updated"), engine.reading_weights():
                pass
        with pytest.raises(EngineStateError, match="updated while they were read"), engine.reading_weights():
            await engine.update_weights()


def test_a_copy_has_no_gradients_and_the_module_stays_as_it_is() -> None:
    module = module_of()
    module(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    engine = replicated(module)
    engine.start()
    engine.stop()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_module_that_cannot_be_copied_is_refused_by_name() -> None:
    module = module_of()
    module.lock = (generator for generator in ())  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="cannot be copied for a second replica"):
        copy_of(module, "cpu")


def test_devices_are_those_that_are_named() -> None:
    with pytest.raises(ConfigurationError, match="the live module is on cpu, and devices names meta for it"):
        ReplicatedEngine(module_of(), devices=["meta", "cpu"], skip_tokenizer_init=True).start()
    with pytest.raises(ConfigurationError, match="device 'nowhere' is unknown"):
        ReplicatedEngine(devices=["cpu", "nowhere"]).start()
    engine = ReplicatedEngine(module_of(), devices=["cpu", "cpu"], skip_tokenizer_init=True, **SETTINGS)
    engine.start()
    assert [replica["device"] for replica in engine.get_stats()["replicas"]] == ["cpu", "cpu"]
    engine.stop()


def test_a_live_module_stays_where_it_is_although_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with one GPU, two replicas of a module on the CPU were refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    module = module_of()
    several = Models.read(module, None, EngineConfig(), 2, None)
    made = [several.source(number)() for number in range(2)]
    assert [config.device for _, _, config in made] == ["cpu", "cpu"]
    assert made[0][0] is module
    listed = Models.read([module, module_of(1)], None, EngineConfig(), None, None)
    assert listed.source(1)()[2].device == "cpu"


def test_a_device_that_does_not_exist_is_refused_by_name() -> None:
    for devices in (["nowhere", "cpu"], ["cpu", "nowhere"]):
        with pytest.raises(ConfigurationError, match="device 'nowhere' is unknown"):
            ReplicatedEngine(module_of(), devices=devices, skip_tokenizer_init=True).start()


def test_an_inference_module_runs_on_replicas() -> None:
    single, several = InferenceModule(None, device="cpu"), InferenceModule(None, device="cpu", replicas=2)
    texts = ["import", "def f(x):"]
    for method in ("get_logprobs", "get_logits"):
        values = getattr(several, method)(texts, [" os", " return"])
        torch.testing.assert_close(values, getattr(single, method)(texts, [" os", " return"]), atol=1e-4, rtol=1e-4)
    assert several.generate(texts, max_new_tokens=4, do_sample=False).texts == (
        single.generate(texts, max_new_tokens=4, do_sample=False).texts
    )
    single.close()
    several.close()


def test_more_replicas_than_gpus_are_refused_when_they_load() -> None:
    with pytest.raises(ConfigurationError, match=r"99 replicas need a GPU each.*device='cpu'"):
        ReplicatedEngine(replicas=99, device="cuda").start()


def test_replicas_share_the_cores_and_the_memory_of_one_device() -> None:
    config = EngineConfig(gpu_memory_utilization=0.8, device="cpu", num_threads=None)
    assert config_of_replica(config, "cuda:1", 1) == config.model_copy(update={"device": "cuda:1"})
    assert config_of_replica(config, "cuda:1", 2).gpu_memory_utilization == 0.4
    assert config_of_replica(config, "cpu", 10**6).num_threads == 1
    assert config_of_replica(EngineConfig(num_threads=3), "cpu", 2).num_threads == 3
    assert device_of_replica(1, 2, "cpu") == "cpu"
    assert device_of_replica(0, 1, "cuda:3") == "cuda:3"
    assert device_of_replica(1, 2, "cuda:3") == "cuda:3"


def test_the_code_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "replicas.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/replicas.md", "exec"), {"__name__": "docs"})
    texts, routed = capsys.readouterr().out.splitlines()
    assert len(eval(texts)) == 4
    assert sum(eval(routed)) == 4

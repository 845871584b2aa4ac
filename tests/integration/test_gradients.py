"""`engine.score(requires_grad=True)`: rollouts, scores and gradients over one copy of the weights."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from penstock import (
    LLM,
    ConfigurationError,
    EngineStateError,
    InferenceEngine,
    RequestError,
    RequestPriority,
    RequestTooLarge,
    SamplingParams,
    ScriptedModel,
    WeightsError,
)
from tests.tiny_models import build

PARAMS = SamplingParams(temperature=0.8, max_tokens=6, ignore_eos=True, seed=1, logprobs=0)
PROMPT = [5, 6, 7, 8, 9, 10]


async def test_the_ratio_of_a_fresh_rollout_is_one_and_its_gradient_is_the_module_s() -> None:
    model = build("llama")
    async with InferenceEngine(model, skip_tokenizer_init=True) as engine:
        outputs = await asyncio.gather(*(engine.generate(PROMPT, PARAMS) for _ in range(3)))
        completions = [output.generated_ids for output in outputs]
        own, engine_valued = [
            await engine.score(
                [PROMPT] * 3, completions, params=SamplingParams(temperature=0.8), requires_grad=True, values=values
            )
            for values in ("module", "engine")
        ]
        scores = await engine.score([PROMPT] * 3, completions, params=SamplingParams(temperature=0.8))
    for score, valued, exact in zip(own, engine_valued, scores, strict=True):
        torch.testing.assert_close(score.logprobs.detach(), torch.from_numpy(exact.tempered), atol=1e-5, rtol=0)
        assert torch.equal(valued.logprobs.detach(), torch.from_numpy(exact.tempered))
        assert float(valued.drift.abs().max()) < 1e-5
    torch.cat([score.logprobs for score in engine_valued]).sum().backward()
    gradient = model.get_parameter("lm_head.weight").grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


async def test_training_steps_between_rollouts_show_in_the_next_scores() -> None:
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    async with InferenceEngine(model, skip_tokenizer_init=True) as engine:
        losses = []
        for _ in range(4):
            (score,) = await engine.score(PROMPT[:3], PROMPT[3:], requires_grad=True)
            loss = -score.logprobs.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        (after,) = await engine.score(PROMPT[:3], PROMPT[3:])
    assert losses == sorted(losses, reverse=True)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([PROMPT])).logits[0, 2:-1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(PROMPT[3:])[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(after.logprobs), expected, atol=1e-5, rtol=0)


async def test_the_event_loop_runs_while_gradients_are_scored() -> None:
    model = build("llama")
    async with InferenceEngine(model, skip_tokenizer_init=True) as engine:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count())
        await engine.score(PROMPT, PROMPT, requires_grad=True)
        counter.cancel()
    assert turns > 1


async def test_the_caller_s_modes_hold_on_the_other_thread() -> None:
    model = build("llama")
    async with InferenceEngine(model, skip_tokenizer_init=True) as engine:
        with torch.no_grad():
            (score,) = await engine.score(PROMPT, PROMPT, requires_grad=True)
        assert not score.logprobs.requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            (rounded,) = await engine.score(PROMPT, PROMPT, requires_grad=True)
    assert rounded.logprobs.dtype == torch.float32
    assert not torch.equal(rounded.logprobs.detach(), score.logprobs)


def test_an_llm_scores_with_gradients_and_adapters() -> None:
    """`LLM.score` took neither `requires_grad` nor `adapter`, although `engine.score` does."""
    model = build("llama")
    llm = LLM(model, skip_tokenizer_init=True)
    (score,) = llm.score(PROMPT, PROMPT, params=SamplingParams(temperature=0.5), requires_grad=True, values="engine")
    (engine_score,) = llm.score(PROMPT, PROMPT, params=SamplingParams(temperature=0.5))
    assert score.logprobs.tolist() == pytest.approx(engine_score.tempered, abs=0)
    score.logprobs.sum().backward()
    assert model.get_parameter("lm_head.weight").grad is not None
    with pytest.raises(RequestError, match="'policy'"):
        llm.score(PROMPT, PROMPT, adapter="policy")
    llm.stop()


async def test_the_caller_s_modes_hold_in_blocking_calls_inside_a_running_loop() -> None:
    """In a notebook, `LLM.score` ran on a thread that knew nothing of `torch.no_grad` and `torch.autocast`."""
    llm = LLM(build("llama"), skip_tokenizer_init=True)
    with torch.no_grad():
        (score,) = llm.score(PROMPT, PROMPT, requires_grad=True)
    assert not score.logprobs.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        (rounded,) = llm.score(PROMPT, PROMPT, requires_grad=True)
    assert not torch.equal(rounded.logprobs.detach(), score.logprobs)
    llm.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"params": SamplingParams(top_p=0.9)}, "does not apply top_p"),
        ({"params": SamplingParams(temperature=0)}, "above 0"),
        ({"values": "mine"}, "'module' or 'engine'"),
        ({"checkpoint_layers": "yes"}, "checkpoint_layers"),
        ({"requires_grad": 2}, "requires_grad"),
        ({"logits": True}, "logits cannot be combined with requires_grad"),  # these four were ignored
        ({"namespace": "a"}, "namespace cannot be combined"),
        ({"priority": RequestPriority.HIGH}, "priority cannot be combined"),
        ({"deadline": 0.0}, "deadline cannot be combined"),
    ],
)
async def test_bad_options_are_refused_before_anything_is_computed(options: dict[str, Any], words: str) -> None:
    async with InferenceEngine(build("llama"), skip_tokenizer_init=True) as engine:
        with pytest.raises(RequestError, match=words):
            await engine.score(PROMPT, PROMPT, **{"requires_grad": True, **options})


async def test_an_engine_without_a_live_module_says_what_to_pass() -> None:
    async with InferenceEngine() as engine:
        with pytest.raises(ConfigurationError, match=r"InferenceEngine\(module, tokenizer\)"):
            await engine.score("a", "b", requires_grad=True)
    async with InferenceEngine(ScriptedModel([5])) as engine:
        with pytest.raises(ConfigurationError, match="live transformers module"):
            await engine.score([1], [2], requires_grad=True)


async def test_no_pairs_have_no_scores() -> None:
    """With gradients, an empty batch raised `ValueError`; without, its result was an empty list."""
    async with InferenceEngine(build("llama"), skip_tokenizer_init=True) as engine:
        assert await engine.score([], [], requires_grad=True) == []


async def test_a_pair_longer_than_the_model_allows_is_refused_with_gradients_too() -> None:
    """It was scored at positions that the model was never trained for."""
    async with InferenceEngine(build("llama"), skip_tokenizer_init=True, max_sequence_length=8) as engine:
        with pytest.raises(RequestTooLarge, match="9 tokens and the limit is 8"):
            await engine.score(PROMPT, [5, 6, 7], requires_grad=True)
        assert len(await engine.score(PROMPT, [5, 6], requires_grad=True)) == 1


async def test_scores_name_the_version_of_their_weights() -> None:
    model = build("llama")
    async with InferenceEngine(model, skip_tokenizer_init=True) as engine:
        for version in range(3):
            (score,) = await engine.score(PROMPT, PROMPT)
            (with_gradients,) = await engine.score(PROMPT, PROMPT, requires_grad=True, values="engine")
            assert (score.weight_version, with_gradients.weight_version) == (version, version)
            async with engine.updating():
                with torch.no_grad():
                    model.get_parameter("lm_head.weight").mul_(1.01)


class Watched(nn.Module):
    """A module in place of another, which calls `on_forward` where gradients are computed."""

    def __init__(self, inner: nn.Module, on_forward: Callable[[], None]) -> None:
        super().__init__()
        self.inner = inner
        self.on_forward = on_forward

    def forward(self, states: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.on_forward()
        output: Tensor = self.inner(states)
        return output


async def test_a_score_with_gradients_that_an_update_overlaps_is_an_error() -> None:
    """It mixed old weights and new ones, and nothing said so."""
    begun, may_go_on, model = threading.Event(), threading.Event(), build("llama")

    def wait() -> None:
        begun.set()
        may_go_on.wait(60)

    model.model.norm = Watched(model.model.norm, wait)  # type: ignore[union-attr]
    async with InferenceEngine(model, skip_tokenizer_init=True) as engine:
        score = asyncio.ensure_future(engine.score(PROMPT, PROMPT, requires_grad=True))
        await asyncio.to_thread(begun.wait, 60)
        async with engine.updating():
            may_go_on.set()
            with pytest.raises(EngineStateError, match="weights of version 0 were updated while they were read"):
                await score
            with pytest.raises(EngineStateError, match="are being updated"):
                await engine.score(PROMPT, PROMPT, requires_grad=True)
        assert (await engine.score(PROMPT, PROMPT, requires_grad=True))[0].weight_version == 1


async def test_a_block_that_reads_weights_is_told_of_every_update() -> None:
    async with InferenceEngine(build("llama"), skip_tokenizer_init=True) as engine:
        with engine.reading_weights() as version:
            assert version == 0
        with pytest.raises(EngineStateError, match="compute them again"), engine.reading_weights():
            await engine.update_weights()
        with engine.reading_weights() as version:
            assert version == 1
            with pytest.raises(WeightsError):
                await engine.update_weights({"no.such.weight": torch.ones(1)})


async def test_adapters_of_a_live_module_get_the_gradients_of_plain_passes() -> None:
    base: Any = build("llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.eval()
    base.lm_head.weight.requires_grad_(True)
    async with InferenceEngine(model, skip_tokenizer_init=True) as engine:
        (score,) = await engine.score(PROMPT[:3], PROMPT[3:], requires_grad=True)
        (exact,) = await engine.score(PROMPT[:3], PROMPT[3:])
        with pytest.raises(RequestError, match="lend the engine the peft module"):
            await engine.score(PROMPT[:3], PROMPT[3:], requires_grad=True, adapter="default")
    torch.testing.assert_close(score.logprobs.detach(), torch.from_numpy(exact.logprobs), atol=1e-5, rtol=0)
    score.logprobs.sum().backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    actual = {name: value.grad.clone() for name, value in trained.items() if value.grad is not None}
    model.zero_grad()
    logprobs = model(input_ids=torch.tensor([PROMPT])).logits[0, 2:-1].log_softmax(-1)
    logprobs.gather(-1, torch.tensor(PROMPT[3:])[:, None]).sum().backward()
    assert actual.keys() == trained.keys()
    for name, value in trained.items():
        assert value.grad is not None
        torch.testing.assert_close(actual[name], value.grad, atol=1e-5, rtol=1e-4)

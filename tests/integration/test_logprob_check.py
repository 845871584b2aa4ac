"""`engine.check_logprobs()`: how far what an engine reported is from what the live module computes."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock import (
    LLM,
    ConfigurationError,
    EngineStateError,
    InferenceEngine,
    RequestError,
    RequestOutput,
    SamplingParams,
    ScriptedModel,
)
from tests.tiny_models import build

PROMPT = list(range(5, 30))
PARAMS = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12, ignore_eos=True, seed=1, n=2)


def engine_of(model: Any, **settings: Any) -> InferenceEngine:
    return InferenceEngine(model, skip_tokenizer_init=True, num_threads=1, batch_timeout_ms=0, **settings)


@pytest.mark.parametrize("settings", [{}, {"weight_mode": "packed"}], ids=["shared", "packed"])
async def test_what_an_engine_reports_is_what_its_module_computes(settings: dict[str, Any]) -> None:
    async with engine_of(build("llama"), kept_outputs=2, **settings) as engine:
        for length in (25, 9, 20):
            output = await engine.generate(PROMPT[:length], PARAMS)
        report = await engine.check_logprobs()
        assert (report.num_completions, report.num_tokens) == (4, 48), "the first request is not kept any more"
        assert (report.weight_version, report.num_other_version, report.num_stale) == (0, 0, 0)
        assert 0 <= report.mean_difference <= report.max_difference < 1e-4
        assert 1 - 1e-4 < report.min_ratio <= report.mean_ratio <= report.max_ratio < 1 + 1e-4
        assert abs(report.kl) < 1e-8
        given = await engine.check_logprobs(output)
        assert (given.num_completions, given.num_tokens) == (2, 24)


async def test_the_worst_token_is_named() -> None:
    async with engine_of(build("llama")) as engine:
        outputs = [await engine.generate(PROMPT[:length], PARAMS, request_id=f"r{length}") for length in (25, 9, 20)]
        changed = outputs[1].outputs[1]
        changed.token_logprobs[7] -= 0.5
        report = await engine.check_logprobs(outputs)
    worst = report.worst
    assert (worst.request_id, worst.index, worst.position, worst.token_id) == ("r9", 1, 7, changed.token_ids[7])
    assert worst.engine_logprob == changed.token_logprobs[7]
    assert report.max_difference == pytest.approx(0.5, abs=1e-4)
    assert report.max_ratio == pytest.approx(math.exp(0.5), abs=1e-3)
    assert report.mean_ratio == pytest.approx(1 + (math.exp(0.5) - 1) / 72, abs=1e-4)
    assert report.kl == pytest.approx((math.exp(0.5) - 1.5) / 72, abs=1e-4)


async def test_weights_that_were_changed_outside_of_an_update_are_detected() -> None:
    """Packed copies do not follow them, so the engine goes on with the old weights."""
    model = build("llama")
    async with engine_of(model, weight_mode="packed", kept_outputs=8) as engine:
        if engine.get_stats()["weight_mode"] != "packed":
            pytest.skip("no compiler")
        await engine.generate(PROMPT, PARAMS)
        assert (await engine.check_logprobs()).max_difference < 1e-4
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)
        await engine.generate(PROMPT, PARAMS)
        assert (await engine.check_logprobs()).max_difference > 1e-2
        async with engine.updating():
            pass
        output = await engine.generate(PROMPT, PARAMS)
        assert (await engine.check_logprobs(output)).max_difference < 1e-4


class Watched(nn.Module):
    """A module in place of another, which calls `on_forward` first."""

    def __init__(self, inner: nn.Module, on_forward: Callable[[], None]) -> None:
        super().__init__()
        self.inner = inner
        self.on_forward = on_forward

    def forward(self, states: Tensor) -> Tensor:
        self.on_forward()
        output: Tensor = self.inner(states)
        return output


class Hold:
    """Holds the fourth pass of a model after `arm` until it may go on."""

    def __init__(self, model: Any) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self._passes: Iterator[int] = itertools.count(100)
        model.model.norm = Watched(model.model.norm, lambda: self._on_forward())  # a view copies no function

    def arm(self) -> None:
        self.begun.clear()
        self.may_go_on.clear()
        self._passes = itertools.count(1)

    def _on_forward(self) -> None:
        if next(self._passes) == 4:
            self.begun.set()
            self.may_go_on.wait(60)


async def generate_across_an_update(engine: InferenceEngine, model: Any, hold: Hold, stale_kv: bool) -> RequestOutput:
    """Forty tokens, of which some are sampled with the weights of before and some with those of after."""
    hold.arm()
    handle = engine.generate(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, seed=1))
    await asyncio.to_thread(hold.begun.wait, 60)
    weights = {"lm_head.weight": model.lm_head.weight.detach() * 1.02}
    update = asyncio.ensure_future(engine.update_weights(weights, mode="keep", stale_kv=stale_kv))
    await asyncio.sleep(0)
    hold.may_go_on.set()
    await update
    return await handle


async def test_tokens_of_other_versions_and_of_stale_kv_are_counted_and_not_compared() -> None:
    model = build("llama")
    hold = Hold(model)
    async with engine_of(model) as engine:
        first = await engine.generate(PROMPT, PARAMS)
        spanning = await generate_across_an_update(engine, model, hold, stale_kv=False)
        report = await engine.check_logprobs([first, spanning])
        versions = spanning.outputs[0].weight_versions
        assert (report.weight_version, report.num_completions) == (1, 1)
        assert (report.num_tokens, report.num_other_version) == (versions.count(1), 24 + versions.count(0))
        assert 0 < versions.count(0) < 40
        assert report.max_difference < 1e-4
        stale = await generate_across_an_update(engine, model, hold, stale_kv=True)
        with pytest.raises(RequestError, match="version 2: 64 are of other versions and 40 of stale"):
            await engine.check_logprobs([first, spanning, stale])
        report = await engine.check_logprobs([first, spanning, stale, await engine.generate(PROMPT, PARAMS)])
    assert (report.num_tokens, report.num_other_version, report.num_stale) == (24, 64, 40)
    assert report.max_difference < 1e-4


async def test_dropout_of_a_module_in_train_mode_is_no_drift() -> None:
    model = build("gpt2").train()
    async with engine_of(model, kept_outputs=1) as engine:
        await engine.generate(PROMPT, PARAMS)
        assert (await engine.check_logprobs()).max_difference < 1e-4
    assert model.training


async def test_where_there_is_nothing_to_compare_the_remedy_is_named() -> None:
    model = build("llama")
    async with engine_of(model) as engine:
        await engine.generate(PROMPT, PARAMS)
        with pytest.raises(RequestError, match="kept_outputs"):
            await engine.check_logprobs()
        with pytest.raises(RequestError, match="no token"):
            await engine.check_logprobs([])
    async with engine_of(model, kept_outputs=4) as engine:
        await engine.score(PROMPT, PROMPT)
        with pytest.raises(RequestError, match="no request has finished yet"):
            await engine.check_logprobs()
    async with InferenceEngine(ScriptedModel([5]), kept_outputs=4) as engine:
        await engine.generate([1], SamplingParams(max_tokens=1))
        with pytest.raises(ConfigurationError, match="live module"):
            await engine.check_logprobs()


def _without_prompt(output: RequestOutput) -> object:
    return replace(output, prompt_token_ids=[])


def _without_logprobs(output: RequestOutput) -> object:
    return replace(output, outputs=[replace(output.outputs[0], token_logprobs=[])])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda output: 5, "outputs"),
        (lambda output: [output, None], "must be RequestOutputs"),
        (lambda output: "text", "outputs"),
        (_without_prompt, "prompt's token ids"),
        (_without_logprobs, "a log probability and a weight version for every token"),
    ],
)
async def test_what_cannot_be_checked_is_refused(change: Callable[[RequestOutput], Any], words: str) -> None:
    async with engine_of(build("llama")) as engine:
        output = await engine.generate(PROMPT, PARAMS)
        with pytest.raises(RequestError, match=words):
            await engine.check_logprobs(change(output))


async def test_a_check_inside_of_an_update_is_refused() -> None:
    async with engine_of(build("llama"), kept_outputs=1) as engine:
        await engine.generate(PROMPT, PARAMS)
        async with engine.updating():
            with pytest.raises(EngineStateError, match="are being updated"):
                await engine.check_logprobs()


def test_an_llm_checks_without_a_coroutine() -> None:
    llm = LLM(build("llama"), skip_tokenizer_init=True)
    output = llm.generate([PROMPT], PARAMS, use_tqdm=False)
    assert llm.check_logprobs(output).max_difference < 1e-4
    llm.stop()

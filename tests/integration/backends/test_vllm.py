"""Real vLLM beyond the contract: parameters, scores, priorities, weights, and agreement with the native engine."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import (
    DeadlineExceeded,
    GrammarError,
    InferenceEngine,
    RequestAborted,
    RequestError,
    RequestOutput,
    RequestPriority,
    RequestTooLarge,
    SamplingParams,
    StructuredOutputs,
)
from penstock.backends.vllm_engine import VLLMEngine
from penstock.errors import EngineStateError, WeightsError
from tests.integration.backends.vllm_engines import MODEL, RunningLLM, native, needs_vllm

pytestmark = needs_vllm

TEXT = {"prompt": "Once upon a time there was a little"}
CHAT = [{"role": "user", "content": "Tell me a story."}]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
TOLERANCE = 1e-3


@pytest.fixture
def engine(llm_with_logprobs: RunningLLM) -> Iterator[VLLMEngine]:
    llm, loop = llm_with_logprobs
    engine = VLLMEngine(llm, loop=loop)
    engine.start()
    yield engine
    engine.stop(0)


@pytest.fixture(scope="module")
def native_engine() -> Iterator[InferenceEngine]:
    engine = native()
    engine.start()
    yield engine
    engine.stop(0)


def largest_difference(left: Sequence[float], right: Sequence[float]) -> float:
    assert len(left) == len(right)
    return float(np.abs(np.subtract(left, right)).max())


async def test_prompts_become_the_same_tokens_as_in_the_native_engine(
    engine: VLLMEngine, native_engine: InferenceEngine
) -> None:
    for prompt in (TEXT, "Hello", CHAT, [5, 6, 7], {"messages": [*CHAT, {"role": "assistant", "content": "One day"}]}):
        assert await engine.tokenize(prompt) == await native_engine.tokenize(prompt)
    ids = await engine.tokenize(TEXT)
    assert await engine.detokenize(ids) == await native_engine.detokenize(ids)


async def test_greedy_text_and_log_probabilities_agree_with_the_native_engine(
    engine: VLLMEngine, native_engine: InferenceEngine
) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    mine, theirs = await native_engine.generate(CHAT, params), await engine.generate(CHAT, params)
    assert (theirs.prompt, theirs.prompt_token_ids, theirs.text) == (mine.prompt, mine.prompt_token_ids, mine.text)
    (left,), (right,) = mine.outputs, theirs.outputs
    assert left.token_ids == right.token_ids
    difference = largest_difference(left.token_logprobs, right.token_logprobs)
    print(f"largest difference of token log probabilities: {difference:.2e}")
    assert difference < TOLERANCE
    assert right.sampled_logprobs == left.sampled_logprobs
    assert right.weight_versions == [0] * 24
    for one, other in zip(left.logprobs or [], right.logprobs or [], strict=True):
        assert one.keys() == other.keys()
        assert [one[token].rank for token in one] == [other[token].rank for token in one]
    assert mine.prompt_logprobs is not None
    assert theirs.prompt_logprobs is not None
    assert len(theirs.prompt_logprobs) == len(mine.prompt_logprobs)
    assert theirs.prompt_logprobs[0] is None


async def test_scores_agree_with_the_native_engine_and_with_generation(
    engine: VLLMEngine, native_engine: InferenceEngine
) -> None:
    """000-61."""
    output = await engine.generate(CHAT, GREEDY)
    completions = [output.generated_ids, [7, 8, 9]]
    prompts = [output.prompt_token_ids, [5, 6]]
    scores = await engine.score(prompts, completions, entropies=True, params=SamplingParams(temperature=0.5))
    plain = await engine.score(prompts, completions)
    assert largest_difference(scores[0].logprobs, output.outputs[0].token_logprobs) < TOLERANCE
    for prompt, completion, score, bare in zip(prompts, completions, scores, plain, strict=True):
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        reference = await native_engine.generate([*prompt, *completion], params)
        entries = (reference.prompt_logprobs or [])[len(prompt) :]
        expected = [entry[token].logprob for entry, token in zip(entries, completion, strict=True) if entry]
        assert largest_difference(score.logprobs, expected) < TOLERANCE
        assert largest_difference(bare.logprobs, expected) < TOLERANCE
        assert bare.tempered is None
        assert len(score.entropies) == len(score.tempered) == len(completion)
        assert (score.entropies > 0).all()
    with pytest.raises(RequestError, match="raw_logits"):
        await engine.score([[1]], [[2]], logits=True)
    with pytest.raises(RequestError, match="cannot score with top_p"):
        await engine.score([[1]], [[2]], params=SamplingParams(top_p=0.5))


async def test_several_completions_stream_apart_and_an_abort_keeps_all_of_them(engine: VLLMEngine) -> None:
    params = SamplingParams(n=3, temperature=1, seed=5, max_tokens=400, ignore_eos=True)
    handle = engine.generate(CHAT, params)
    seen = {0: 0, 1: 0, 2: 0}
    async for delta in handle:
        seen[delta.index] += len(delta.token_ids)
        if all(count > 3 for count in seen.values()):
            break
    handle.cancel()
    with pytest.raises(RequestAborted) as caught:
        await handle
    assert caught.value.output is not None
    for completion in caught.value.output.outputs:
        assert len(completion.token_ids) >= seen[completion.index]
        assert len(completion.token_ids) == len(completion.token_logprobs) == len(completion.weight_versions)
        assert completion.finish_reason == "abort"


async def test_greedy_completions_that_are_alike_run_once(engine: VLLMEngine) -> None:
    output = await engine.generate(CHAT, SamplingParams(n=2, temperature=0, max_tokens=5, ignore_eos=True))
    assert [completion.index for completion in output.outputs] == [0, 1]
    assert output.outputs[0].token_ids == output.outputs[1].token_ids


async def test_a_deadline_keeps_what_was_generated(engine: VLLMEngine) -> None:
    handle = engine.generate(CHAT, SamplingParams(max_tokens=1500, ignore_eos=True), deadline=1.0)
    with pytest.raises(DeadlineExceeded) as caught:
        await handle
    output = caught.value.output
    assert output is not None
    assert output.outputs[0].finish_reason == "deadline"
    assert output.text
    assert (await engine.detokenize(output.generated_ids, skip_special_tokens=True)).startswith(output.text)


async def test_a_seed_repeats_a_draw(engine: VLLMEngine) -> None:
    async def draw(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.2, top_k=50, seed=seed, max_tokens=12, ignore_eos=True)
        return (await engine.generate(CHAT, params)).generated_ids

    assert await draw(3) == await draw(3) != await draw(4)
    assert await draw(-1) == await draw(-1)  # which vLLM itself would read as "no seed"


async def test_stop_strings_and_stop_tokens_end_the_text(engine: VLLMEngine) -> None:
    whole = await engine.generate(CHAT, GREEDY)
    word = whole.text.split()[3]
    stopped = await engine.generate(CHAT, SamplingParams(temperature=0, max_tokens=24, stop=[word]))
    assert stopped.text == whole.text[: whole.text.index(word)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", word)
    token = whole.generated_ids[5]
    ended = await engine.generate(CHAT, SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token]))
    assert ended.outputs[0].stop_reason == token
    assert ended.generated_ids == whole.generated_ids[: whole.generated_ids.index(token) + 1]


@pytest.mark.parametrize(
    ("structure", "check"),
    [
        (StructuredOutputs(choice=["yes", "no"]), lambda text: text in ("yes", "no")),
        (StructuredOutputs(regex="[0-9]{3}"), lambda text: text.isdigit() and len(text) == 3),
        (
            StructuredOutputs(
                json={
                    "type": "object",
                    "properties": {"a": {"type": "boolean"}},
                    "required": ["a"],
                    "additionalProperties": False,
                }
            ),
            lambda text: isinstance(json.loads(text)["a"], bool),
        ),
    ],
)
async def test_structured_outputs_have_their_form(engine: VLLMEngine, structure: Any, check: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, structured_outputs=structure)
    output = await engine.generate(CHAT, params)
    assert output.outputs[0].finish_reason == "stop"
    assert check(output.text)


async def test_what_cannot_run_is_refused_with_a_typed_error(engine: VLLMEngine) -> None:
    bad = SamplingParams(structured_outputs=StructuredOutputs(regex="(((["))
    with pytest.raises(GrammarError):
        await engine.generate(CHAT, bad)
    with pytest.raises(RequestTooLarge, match="max_model_len"):
        await engine.generate([1] * 2000, SamplingParams(max_tokens=100))
    with pytest.raises(RequestError, match="refused"):
        await engine.generate([10**6], GREEDY)
    assert (
        len((await engine.generate([1] * 2000, SamplingParams(max_tokens=None, ignore_eos=True))).generated_ids) == 48
    )


async def test_a_namespace_shares_no_prefix_with_another(engine: VLLMEngine) -> None:
    prompt = [1 + token % 30 for token in range(700)]
    params = SamplingParams(temperature=0, max_tokens=2)

    async def cached(namespace: str) -> int:
        return (await engine.generate(prompt, params, namespace=namespace)).num_cached_tokens

    assert await cached("one") == 0
    assert await cached("one") > 0
    assert await cached("two") == 0


async def test_new_weights_are_loaded_and_bad_ones_refused(engine: VLLMEngine, tmp_path: Path) -> None:
    before = await engine.generate(CHAT, GREEDY)
    good = altered_model(tmp_path / "good", 1.5)
    for folder in bad_folders(good, tmp_path):
        with pytest.raises(WeightsError):
            await engine.update_weights(folder)
    assert (await engine.generate(CHAT, GREEDY)).generated_ids == before.generated_ids
    try:
        assert await engine.update_weights(good) == engine.weight_version == 1
        after = await engine.generate(CHAT, GREEDY)
        reference = native(str(good))
        expected = await reference.generate(CHAT, GREEDY)
        await asyncio.to_thread(reference.stop, 0)
        assert after.generated_ids == expected.generated_ids != before.generated_ids
        assert largest_difference(after.outputs[0].token_logprobs, expected.outputs[0].token_logprobs) < TOLERANCE
        assert after.outputs[0].weight_versions == [1] * 24
    finally:
        await engine.update_weights(MODEL)
    assert (await engine.generate(CHAT, GREEDY)).generated_ids == before.generated_ids


async def test_an_update_waits_for_what_runs_or_aborts_it(engine: VLLMEngine) -> None:
    handle = engine.generate(CHAT, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    await anext(handle)
    version = await engine.update_weights(MODEL, mode="wait")
    assert (await handle).outputs[0].weight_versions == [version - 1] * 60
    handle = engine.generate(CHAT, SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True))
    await anext(handle)
    await engine.update_weights(MODEL)
    with pytest.raises(RequestAborted) as caught:
        await handle
    assert caught.value.output is not None
    assert 0 < len(caught.value.output.generated_ids) < 1500
    with pytest.raises(RequestError, match="old K/V"):
        await engine.update_weights(MODEL, mode="keep")


async def test_an_order_whose_caller_leaves_while_it_waits_is_taken_back_at_vllm(engine: VLLMEngine) -> None:
    version = engine.weight_version
    running = engine.generate(CHAT, SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True))
    await anext(running)
    for order in (engine.pause("wait"), engine.update_weights(MODEL, mode="wait")):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await order
        assert (await engine.generate(CHAT, GREEDY)).outputs[0].weight_versions == [version] * 24
    running.cancel()
    with pytest.raises(RequestAborted):
        await running
    assert await engine.update_weights(MODEL, mode="wait") == version + 1


async def test_a_paused_engine_starts_nothing(engine: VLLMEngine) -> None:
    await engine.pause()
    with pytest.raises(EngineStateError):
        await engine.pause()
    handle = engine.generate(CHAT, GREEDY)
    with pytest.raises(DeadlineExceeded):
        await engine.generate(CHAT, GREEDY, deadline=0.3)
    assert not handle.done()
    await engine.resume()
    assert len((await handle).generated_ids) == 24
    with pytest.raises(EngineStateError):
        await engine.resume()


async def test_logits_agree_with_the_native_engine(llm_with_logits: RunningLLM, native_engine: InferenceEngine) -> None:
    llm, loop = llm_with_logits
    async with VLLMEngine(llm, loop=loop) as engine:
        await check_logits(engine, native_engine)


async def test_the_higher_priority_goes_first(llm_with_logits: RunningLLM) -> None:
    llm, loop = llm_with_logits
    async with VLLMEngine(llm, loop=loop) as engine:
        await check_priorities(engine, llm.scheduler_config.max_num_seqs)


async def check_logits(engine: VLLMEngine, native_engine: InferenceEngine) -> None:
    output = await engine.generate(CHAT, GREEDY)
    assert output.outputs[0].token_logprobs == []  # vLLM reports one or the other
    (score,) = await engine.score([output.prompt_token_ids], [output.generated_ids], logits=True)
    reference = await native_engine.generate(output.prompt_token_ids, SamplingParams(**PARAMS, logprobs=-1))
    (completion,) = reference.outputs
    assert completion.token_ids == output.generated_ids
    logprobs = np.array([[row[token].logprob for token in range(len(row))] for row in completion.logprobs or []])
    normalized = score.logits - np.log(np.exp(score.logits.astype(np.float64)).sum(-1, keepdims=True))
    difference = float(np.abs(normalized - logprobs).max())
    print(f"largest difference over {logprobs.size} log probabilities: {difference:.2e}")
    assert difference < TOLERANCE
    assert largest_difference(score.logprobs, completion.token_logprobs) < TOLERANCE


PARAMS: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


async def check_priorities(engine: VLLMEngine, num_places: int) -> None:
    """When all places in the batch are taken, the second of two that wait goes first if its class is higher."""
    order: list[str] = []

    async def note(name: str, handle: Any) -> RequestOutput:
        output: RequestOutput = await handle
        order.append(name)
        return output

    lengths = [60, *[200] * (num_places - 1)]  # one place becomes free, long before the others do
    running = [engine.generate(CHAT, replace(GREEDY, max_tokens=length)) for length in lengths]
    for handle in running:
        await anext(handle)
    low = engine.generate(CHAT, GREEDY, priority=RequestPriority.LOW)
    high = engine.generate(CHAT, GREEDY, priority=RequestPriority.CRITICAL)
    await asyncio.gather(note("low", low), note("high", high), *running)
    assert order == ["high", "low"]


def altered_model(folder: Path, factor: float) -> Path:
    """The shipped model with one layer's weights multiplied, in a folder of its own."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("mlp.down_proj.weight"))
    weights[name] = weights[name] * factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def bad_folders(good: Path, tmp_path: Path) -> Iterator[Any]:
    """A missing folder, an empty one, a cut file, a lacking and a misshapen tensor, and what is no folder."""
    import torch
    from safetensors.torch import load_file, save_file

    yield tmp_path / "missing"
    yield tmp_path
    yield {"weight": torch.zeros(1)}
    weights = load_file(good / "model.safetensors")
    name = min(weights)
    for kind, changed in (
        ("lacking", {key: value for key, value in weights.items() if key != name}),
        ("misshapen", weights | {name: weights[name][:1].clone()}),
    ):
        (tmp_path / kind).mkdir()
        save_file(changed, tmp_path / kind / "model.safetensors")
        yield tmp_path / kind
    (tmp_path / "cut").mkdir()
    data = (good / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[: len(data) // 2])
    yield tmp_path / "cut"

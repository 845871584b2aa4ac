"""Forks, samples and beams of a real model, through the whole engine, from any thread or loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock import InferenceEngine, RequestError, RequestOutput, SamplingParams
from penstock.demo import MODEL_DIR
from tests.held_passes import Served, read
from tests.tiny_models import build

PROMPT = [5, 9, 30, 8, 77, 12, 40, 3, 2, 66, 31]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SETTINGS: dict[str, Any] = {"skip_tokenizer_init": True, "block_size": 4, "log_level": "ERROR"}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with Served(build("llama"), **SETTINGS) as served:
        yield served


@pytest.fixture
def engine(served: Served) -> InferenceEngine:
    return served.engine


@pytest.mark.parametrize(
    "settings", [{}, {"enable_kv_cache": False}, {"kv_cache_tokens": 72, "max_batch_size": 3}], ids=str
)
async def test_a_fork_says_what_a_fresh_request_from_there_would(settings: dict[str, Any]) -> None:
    async with Served(build("qwen3"), **{**SETTINGS, **settings}) as served:
        engine, handle = served.engine, await served.begin(PROMPT, GREEDY, 6)
        forks = [*handle.fork(2), *handle.fork(2, GREEDY, at=5), *handle.fork(1, GREEDY, append=[7, 7, 7])]
        served.passes.release()
        outputs: list[RequestOutput] = await asyncio.gather(handle, *forks)
        for output in outputs[1:]:
            params = SamplingParams(temperature=0.0, max_tokens=len(output.generated_ids), ignore_eos=True)
            fresh = await engine.generate(output.prompt_token_ids, params)
            assert output.generated_ids == fresh.generated_ids
            assert output.generated_ids
        assert outputs[1].output_ids == outputs[0].output_ids, "a greedy fork goes the same way"
        assert [len(output.generated_ids) for output in outputs[3:]] == [24, 24, 24]


async def test_a_fork_computes_nothing_anew(served: Served) -> None:
    handle = await served.begin(PROMPT * 20, GREEDY, 3)
    [fork] = handle.fork()
    served.passes.release()
    output = await fork
    prompt = len(output.prompt_token_ids)
    assert output.num_cached_tokens >= prompt - 2, "all but the newest token, which the next step computes"


async def test_sampled_forks_go_their_own_ways_and_do_so_again(served: Served) -> None:
    params, seen = SamplingParams(temperature=1.0, seed=4, max_tokens=20, ignore_eos=True), []
    for _ in range(2):
        handle = await served.begin(PROMPT, params, 4)
        forks = handle.fork(3, at=4)
        served.passes.release()
        outputs = await asyncio.gather(handle, *forks)
        seen.append([output.output_ids[0] for output in outputs])
    assert seen[0] == seen[1]
    assert len(set(map(tuple, seen[0]))) == 4
    assert len({tuple(ids[: len(PROMPT) + 4]) for ids in seen[0]}) == 1


async def test_forks_of_forks(served: Served) -> None:
    handle = await served.begin(PROMPT, GREEDY, 3)
    for _ in range(4):
        [handle] = handle.fork()
        served.passes.arm(4)
        await read(handle, 3)
    served.passes.release()
    output = await handle
    whole = await served.engine.generate(PROMPT, GREEDY)
    assert output.output_ids == whole.output_ids


async def test_dropping_a_fork_frees_it_and_leaves_the_others(served: Served) -> None:
    handle = await served.begin(PROMPT, SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True), 2)
    kept, dropped = handle.fork(2)
    dropped.cancel()
    handle.cancel()
    served.passes.release()
    assert len((await kept).generated_ids) == 198
    stats = served.engine.get_stats()
    assert (stats["queue"]["num_requests"], stats["queue"]["num_running"]) == (0, 0)


async def test_forks_from_a_thread_and_from_another_loop(served: Served) -> None:
    handle = await served.begin(PROMPT, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True), 2)
    are_forked = threading.Barrier(3)
    found: list[list[int]] = []

    def plainly() -> None:
        [fork] = handle.fork()
        are_forked.wait(60)
        found.append(fork.result(60).output_ids[0])

    def on_a_loop() -> None:
        async def await_a_fork() -> None:
            [fork] = handle.fork()
            are_forked.wait(60)
            found.append((await fork).output_ids[0])

        asyncio.run(await_a_fork())

    threads = [threading.Thread(target=target) for target in (plainly, on_a_loop)]
    for thread in threads:
        thread.start()
    await asyncio.to_thread(are_forked.wait, 60)
    served.passes.release()
    output = await handle
    await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    assert found == [output.output_ids[0]] * 2


async def test_what_cannot_be_forked_is_refused(engine: InferenceEngine) -> None:
    handle = engine.generate(PROMPT, GREEDY)
    await handle
    with pytest.raises(RequestError, match="has ended"):
        handle.fork()
    beams = engine.generate(PROMPT, SamplingParams(use_beam_search=True, best_of=4, temperature=0.0, max_tokens=100))
    with pytest.raises(RequestError, match=r"has no tokens yet|is a beam search"):
        await beams.fork()[0]


async def test_samples_of_a_prompt_draw_what_each_would_alone(engine: InferenceEngine) -> None:
    """The seed, the sample's number and the position decide, however the samples are run."""
    params = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
    four = await engine.generate(PROMPT, SamplingParams(n=4, **params))
    two = await engine.generate(PROMPT, SamplingParams(n=2, **params))
    one = await engine.generate(PROMPT, SamplingParams(**params))
    assert [out.token_ids for out in two.outputs] == [out.token_ids for out in four.outputs[:2]]
    assert one.generated_ids == four.generated_ids


async def test_the_best_of_many_come_best_first(engine: InferenceEngine) -> None:
    params = {"temperature": 1.0, "seed": 3, "max_tokens": 12}
    every = await engine.generate(PROMPT, SamplingParams(n=6, **params))
    chosen = await engine.generate(PROMPT, SamplingParams(n=2, best_of=6, rank_by="normalized_logprob", **params))
    means = sorted((out.cumulative_logprob / len(out.token_ids) for out in every.outputs), reverse=True)
    assert [out.score for out in chosen.outputs] == pytest.approx(means[:2])


async def test_a_beam_search_beside_others_finds_what_it_finds_alone(engine: InferenceEngine) -> None:
    beams = SamplingParams(use_beam_search=True, best_of=4, n=4, temperature=0.0, max_tokens=16)
    alone = await engine.generate(PROMPT, beams)
    crowd = [engine.generate(PROMPT[i:], GREEDY) for i in range(8)]
    beside = await engine.generate(PROMPT, beams)
    await asyncio.gather(*crowd)
    assert [out.token_ids for out in beside.outputs] == [out.token_ids for out in alone.outputs]
    scores = [out.score for out in alone.outputs]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(out.token_ids) for out in alone.outputs}) == 4


async def test_texts_of_a_fork_continue_its_parents() -> None:
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=30)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR)
    async with Served(model, tokenizer, log_level="ERROR") as served:
        handle = await served.begin("class Stack:\n", params, 4)
        [fork] = handle.fork()
        served.passes.release()
        output = await fork
        text = tokenizer.decode(output.output_ids[0], skip_special_tokens=True)
    assert output.prompt is not None
    assert output.prompt + output.text == text

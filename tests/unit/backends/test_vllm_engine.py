"""`VLLMEngine` over a stand-in for vLLM; `tests/integration/backends/test_vllm*.py` run on the real one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from penstock import (
    DeadlineExceeded,
    EngineClosed,
    GenerationConfig,
    RequestAborted,
    RequestError,
    RequestPriority,
    RequestTooLarge,
    SamplingParams,
    StructuredOutputs,
)
from penstock.api.event_loop import LoopThread
from penstock.api.protocols import Engine
from penstock.backends.hosted_order import HostedOrder
from penstock.backends.vllm_engine import VLLMEngine
from penstock.backends.vllm_weights import VLLMWeights
from penstock.errors import ConfigurationError, EngineStateError, WeightsError
from penstock.testing.contract import EngineContract
from tests.unit.backends.fake_vllm import FakeLLM, install

PARAMS = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


class TestVLLMEngine(EngineContract):
    def make_engine(self) -> Engine:
        return VLLMEngine(FakeLLM())


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def engine(llm: FakeLLM) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(llm)
    yield engine
    engine.stop(0)


async def test_a_request_in_vllms_words(engine: VLLMEngine, llm: FakeLLM) -> None:
    params = SamplingParams(
        **{"temperature": 0.5, "seed": -1, "stop": "x", "logit_bias": {3: 1.0}, "max_tokens": 3, "logprobs": 1},
        structured_outputs=StructuredOutputs(choice=["a", "b"]),
    )
    output = await engine.generate("hi", params, namespace="one", priority=RequestPriority.HIGH, request_id="r")
    (call,) = llm.calls
    assert call.prompt == {"type": "token", "prompt_token_ids": [104, 105], "cache_salt": "one"}
    assert (call.request_id, call.priority) == ("r", -3)
    assert (call.params.seed, call.params.stop, call.params.logprobs) == (2**64 - 1, ["x"], 1)
    assert call.params.structured_outputs.choice == ["a", "b"]
    assert output.prompt == "hi"
    assert output.prompt_token_ids == [104, 105]
    (completion,) = output.outputs
    assert completion.token_ids == [0, 1, 2]
    assert completion.token_logprobs == [-1.0] * 3
    assert completion.sampled_logprobs == []
    assert completion.logprobs is not None
    assert completion.logprobs[0][500].rank == 1


async def test_the_log_probability_of_the_chosen_token_is_always_there(engine: VLLMEngine, llm: FakeLLM) -> None:
    completion = (await engine.generate([1], SamplingParams(max_tokens=3))).outputs[0]
    assert llm.calls[0].params.logprobs == 0
    assert completion.token_logprobs == completion.sampled_logprobs == [-1.0] * 3
    assert completion.logprobs is None


async def test_the_models_defaults_hold_for_a_request_without_parameters(engine: VLLMEngine, llm: FakeLLM) -> None:
    handle = engine.generate([1] * 1990)
    assert len((await handle).generated_ids) == 10
    assert llm.calls[0].params.top_k == 7
    assert len((await engine.generate([1])).generated_ids) == 256
    await engine.generate([1], GenerationConfig(max_length=5, do_sample=False))
    assert (llm.calls[2].params.max_tokens, llm.calls[2].params.temperature) == (5, 0)
    assert engine.default_params().top_k == 7


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logits_processors=[lambda ids, logits: logits]),
        SamplingParams(temperature=0, n=2, use_beam_search=True),
        SamplingParams(n=1, best_of=2),
        SamplingParams(rank_by="consensus"),
        SamplingParams(no_repeat_ngram_size=2),
        SamplingParams(reasoning_end="</think>"),
        SamplingParams(temperature=2.5),
        SamplingParams(temperature=0.001),
        SamplingParams(bad_words=[[1, 2]]),
        SamplingParams(structured_outputs=StructuredOutputs(json_object=True, whitespace_pattern=" ?")),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_anything_runs(
    engine: VLLMEngine, llm: FakeLLM, params: SamplingParams
) -> None:
    with pytest.raises(RequestError, match="vLLM"):
        engine.generate([1], params)
    assert not llm.calls


async def test_an_engine_without_adapters_refuses_them(engine: VLLMEngine) -> None:
    with pytest.raises(RequestError, match="no adapters: leave out adapter='policy'"):
        engine.generate([1], PARAMS, adapter="policy")
    with pytest.raises(RequestError, match="no adapters"):
        await engine.score([[1]], [[2]], adapter="policy")


async def test_errors_of_vllm_are_typed(engine: VLLMEngine) -> None:
    with pytest.raises(RequestError, match="out of the vocabulary"):
        await engine.generate([10**7], PARAMS)
    with pytest.raises(RequestTooLarge, match="max_model_len of 2000"):
        await engine.generate([1] * 1999, PARAMS)
    with pytest.raises(RequestTooLarge, match="shorten the prompt"):
        await engine.generate([1] * 2000, PARAMS)
    with pytest.raises(RequestError, match="no chat template"):
        await engine.generate([{"role": "user", "content": "hi"}], PARAMS)


async def test_an_abort_keeps_what_vllm_had_not_handed_out() -> None:
    llm = FakeLLM(step=lambda: asyncio.sleep(0.01))
    async with VLLMEngine(llm) as engine:
        handle = engine.generate([1], SamplingParams(max_tokens=1900, n=2, temperature=1.0))
        await anext(handle)
        handle.cancel()
        with pytest.raises(RequestAborted) as caught:
            await handle
    assert caught.value.output is not None
    for completion in caught.value.output.outputs:
        assert completion.token_ids[-1] == 99
        assert completion.finish_reason == "abort"
        assert len(completion.token_logprobs) == len(completion.weight_versions) == len(completion.token_ids)
    assert llm.calls[0].is_closed


async def test_a_request_that_vllm_does_not_know_yet_ends_at_once() -> None:
    never = asyncio.Event
    llm = FakeLLM(step=lambda: never().wait())
    async with VLLMEngine(llm) as engine:
        handle = engine.generate([1], PARAMS)
        handle.cancel()
        with pytest.raises(RequestAborted) as caught:
            await handle
        assert caught.value.output is not None
        assert caught.value.output.generated_ids == []
        late = engine.generate([1], PARAMS, ttft_deadline=0.01)
        with pytest.raises(DeadlineExceeded):
            await late


async def test_priorities_are_not_sent_to_an_engine_that_refuses_them() -> None:
    llm = FakeLLM(policy="fcfs")
    async with VLLMEngine(llm) as engine:
        await engine.generate([1], PARAMS, priority=RequestPriority.CRITICAL)
    assert llm.calls[0].priority == 0


async def test_a_dead_process_fails_every_waiter(tmp_path: Path) -> None:
    never = asyncio.Event
    llm = FakeLLM(step=lambda: never().wait(), model=str(folder(tmp_path / "model")))
    async with VLLMEngine(llm) as engine:
        waiters: list[Any] = [asyncio.ensure_future(engine.generate([1], PARAMS)) for _ in range(3)]
        while len(llm.calls) < 3:  # noqa: ASYNC110 - the update waits for those which it finds
            await asyncio.sleep(0.001)
        waiters.append(asyncio.ensure_future(engine.update_weights(tmp_path / "model", mode="wait")))
        await asyncio.to_thread(llm.paused.wait)
        llm.die()
        results = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(result) for result in results] == [EngineClosed] * 4
        with pytest.raises(EngineClosed, match="process ended"):  # it was vLLM's own error
            await engine.update_weights(tmp_path / "model")


async def test_a_given_llm_stays_up_on_its_loop(llm: FakeLLM) -> None:
    thread = LoopThread("its-own")
    for _ in range(2):
        async with VLLMEngine(llm, loop=thread.loop) as engine:
            assert len((await engine.generate([1], PARAMS)).generated_ids) == 4
    thread.close(wait=True)
    assert not llm.is_shut_down


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
async def test_vllm_shuts_down_once() -> None:
    """vLLM does so again when its object is deleted, and printed an error when that was at the interpreter's exit."""
    async with VLLMEngine("m") as engine:
        await engine.generate([1], PARAMS)
    made = FakeLLM.made.pop()
    assert made.is_shut_down
    made.shutdown()


def test_without_vllm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install vllm"):
        VLLMEngine("some/model")


@pytest.mark.parametrize("options", [{"logprobs_mode": "processed_logits"}, {"scheduling_policy": "fcfs"}])
def test_options_that_would_falsify_results_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ConfigurationError, match=min(options)):
        VLLMEngine("some/model", **options)


# Scores.


async def test_a_score_is_that_of_the_completion_alone(engine: VLLMEngine, llm: FakeLLM) -> None:
    first, second = await engine.score([[9, 9, 9], "ab"], [[1, 2], [3]], namespace="n")
    assert first.logprobs.tolist() == [-1.0, -2.0]
    assert second.logprobs.tolist() == [-3.0]
    assert first.tempered is None
    assert first.logprobs.dtype == np.float32
    assert llm.calls[0].prompt["prompt_token_ids"] == [9, 9, 9, 1, 2]
    assert llm.calls[0].prompt["cache_salt"] == "n"
    (text,) = await engine.score("a", "bc")
    assert text.logprobs.tolist() == [-98.0, -99.0]
    assert (llm.calls[0].params.prompt_logprobs, llm.calls[0].params.max_tokens) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"completions": [[1], [2]]}, "1 prompts and 2 completions"),
        ({"completions": [[]]}, "at least one token"),
        ({"completions": [[1]], "logits": True}, "raw_logits"),
        ({"completions": [[1]], "params": SamplingParams(min_p=0.1)}, "min_p"),
    ],
)
async def test_what_cannot_be_scored_is_refused(engine: VLLMEngine, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        await engine.score([[1]], **arguments)


# Weights.


def folder(path: Path, **shapes: tuple[int, ...]) -> Path:
    """A folder with weights of these shapes."""
    path.mkdir()
    shapes = shapes or {"a": (2, 3), "b": (4,)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path / "model.safetensors")
    return path


async def test_an_update_pauses_loads_and_resumes(tmp_path: Path) -> None:
    llm = FakeLLM(model=str(folder(tmp_path / "model")))
    new = folder(tmp_path / "new")
    async with VLLMEngine(llm) as engine:
        assert await engine.update_weights(new, mode="wait") == engine.weight_version == 1
        output = await engine.generate([1], PARAMS)
    assert output.outputs[0].weight_versions == [1] * 4
    assert llm.log == [("pause", "wait", True), ("reload_weights", str(new)), "reset", ("version", "1"), "resume"]


async def test_weights_that_fail_to_load_are_taken_back(tmp_path: Path) -> None:
    new = folder(tmp_path / "new")

    def fail(path: str) -> None:
        if path == str(new):
            raise RuntimeError("no such layer")

    llm = FakeLLM(model=str(folder(tmp_path / "model")), reload=fail)
    async with VLLMEngine(llm) as engine:
        with pytest.raises(WeightsError, match="no such layer") as caught:
            await engine.update_weights(new)
        assert not caught.value.is_mixed
        assert engine.weight_version == 0
    assert ("reload_weights", str(tmp_path / "model")) in llm.log
    assert llm.log[-1] == "resume"


async def test_weights_of_two_kinds_are_said_to_be_mixed(tmp_path: Path) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("broken")

    llm = FakeLLM(model=str(folder(tmp_path / "model")), reload=fail)
    async with VLLMEngine(llm) as engine:
        with pytest.raises(WeightsError, match="stop this engine") as caught:
            await engine.update_weights(folder(tmp_path / "new"))
        assert caught.value.is_mixed


async def test_bad_folders_never_reach_vllm(tmp_path: Path) -> None:
    llm = FakeLLM(model=str(folder(tmp_path / "model")))
    cut = folder(tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-1])
    noise = folder(tmp_path / "noise")
    (noise / "model.safetensors").write_bytes(b"\xff" * 100)
    indexed = folder(tmp_path / "indexed")
    (indexed / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "z": "y"}}')
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "none": "is not a folder",
        tmp_path / "empty": "no .safetensors file",
        cut: "its header says",
        noise: "is not a safetensors file",
        indexed: "lacks 'z'",
        folder(tmp_path / "lacking", a=(2, 3)): "lacks 'b'",
        folder(tmp_path / "more", a=(2, 3), b=(4,), c=(1,)): "has 'c'",
        folder(tmp_path / "shape", a=(3, 2), b=(4,)): "shape",
    }
    async with VLLMEngine(llm) as engine:
        for bad, words in cases.items():
            with pytest.raises(WeightsError, match=words):
                await engine.update_weights(bad)
        with pytest.raises(WeightsError, match="must be a folder"):
            await engine.update_weights({"a": 1})
        with pytest.raises(RequestError, match="old K/V"):
            await engine.update_weights(tmp_path / "model", mode="keep")
    assert not llm.log


async def test_pauses_come_in_pairs(engine: VLLMEngine, llm: FakeLLM) -> None:
    await engine.pause("keep")
    with pytest.raises(EngineStateError):
        await engine.pause()
    await engine.resume()
    with pytest.raises(EngineStateError):
        await engine.resume()
    with pytest.raises(RequestError, match="unknown"):
        await engine.pause("never")
    assert llm.log == [("pause", "keep", True), "resume"]


async def test_no_request_runs_while_weights_are_loaded(tmp_path: Path) -> None:
    """A resume() let requests run in the middle of an update, and an update did not wait for the end of a pause."""
    llm = FakeLLM(step=lambda: asyncio.sleep(0.01), model=str(folder(tmp_path / "model")))
    new = folder(tmp_path / "new")
    async with VLLMEngine(llm) as engine:
        handle = engine.generate([1], SamplingParams(max_tokens=1900))
        await anext(handle)
        pause = asyncio.ensure_future(engine.pause("wait"))
        assert await asyncio.to_thread(llm.paused.wait, 60)
        update = asyncio.ensure_future(engine.update_weights(new))
        for order in (engine.resume, engine.pause):
            with pytest.raises(EngineStateError, match="wait until that has ended"):
                await order()
        assert llm.log == [("pause", "wait", True)]
        handle.cancel()
        await pause
        assert await update == 1
        await engine.resume()
    assert llm.log == [("pause", "wait", True), ("reload_weights", str(new)), "reset", ("version", "1"), "resume"]


async def test_an_update_in_an_engine_that_is_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raised the CancelledError of `concurrent.futures`."""
    monkeypatch.setattr("penstock.api.event_loop.GRACE_S", 0.01)
    llm = FakeLLM(model=str(folder(tmp_path / "model")))
    monkeypatch.setattr(llm, "resume_generation", lambda: asyncio.Event().wait())
    engine = VLLMEngine(llm)
    update = asyncio.ensure_future(engine.update_weights(folder(tmp_path / "new")))
    assert await asyncio.to_thread(llm.paused.wait, 60)
    await asyncio.to_thread(engine.stop, 0)
    with pytest.raises(EngineClosed, match="was stopped"):
        await update


@pytest.mark.parametrize("order", ["pause", "update"])
async def test_a_caller_who_leaves_an_order_that_waits_for_requests_takes_it_back(tmp_path: Path, order: str) -> None:
    """vLLM stayed paused, and an update was carried out later, although nobody waited for it."""
    llm = FakeLLM(step=lambda: asyncio.sleep(0.01), model=str(folder(tmp_path / "model")))
    async with VLLMEngine(llm) as engine:
        handle = engine.generate([1], SamplingParams(max_tokens=1900))
        await anext(handle)
        waiting = engine.pause("wait") if order == "pause" else engine.update_weights(tmp_path / "model", mode="wait")
        task = asyncio.ensure_future(waiting)
        assert await asyncio.to_thread(llm.paused.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(llm.resumed.wait, 60)
        handle.cancel()
        await engine.pause("wait")  # nothing is open that it would have to wait for
        await engine.resume()
    assert llm.log == [("pause", "wait", True), "resume"] * 2
    assert engine.weight_version == 0


async def test_a_caller_who_leaves_lets_weights_be_loaded_to_the_end(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    async def load(method: str, kwargs: dict[str, str]) -> None:
        llm.log.append(method)
        begun.set()
        await asyncio.to_thread(may_end.wait, 60)

    llm = FakeLLM(model=str(folder(tmp_path / "model")))
    llm.collective_rpc = load  # type: ignore[method-assign]
    async with VLLMEngine(llm) as engine:
        task = asyncio.ensure_future(engine.update_weights(tmp_path / "model"))
        assert await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_end.set()
        assert await asyncio.to_thread(llm.resumed.wait, 60)
        assert engine.weight_version == 1
        assert (await engine.generate([1], PARAMS)).outputs[0].weight_versions == [1] * 4
    assert llm.log == [("pause", "abort", True), "reload_weights", "reset", ("version", "1"), "resume"]


async def test_a_caller_who_leaves_while_others_hold_the_engine_waits_for_no_turn(tmp_path: Path) -> None:
    llm = FakeLLM(step=lambda: asyncio.sleep(0.01), model=str(folder(tmp_path / "model")))
    async with VLLMEngine(llm) as engine:
        handle = engine.generate([1], SamplingParams(max_tokens=1900))
        await anext(handle)
        first = asyncio.ensure_future(engine.update_weights(tmp_path / "model", mode="wait"))
        assert await asyncio.to_thread(llm.paused.wait, 60)
        second = asyncio.ensure_future(engine.update_weights(tmp_path / "model", mode="wait"))
        await engine.tokenize("a")  # the second one has its turn of the loop
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        handle.cancel()
        assert await first == 1
    assert llm.log.count(("pause", "wait", True)) == 1


async def test_a_pause_that_is_reached_while_its_caller_leaves_is_left_again() -> None:
    """The caller cannot know that it was reached."""
    order, calls = HostedOrder(), []
    order.leave()
    with pytest.raises(asyncio.CancelledError):
        await order.wait_for(asyncio.sleep(0))
    reached = HostedOrder()
    await reached.wait_for(asyncio.sleep(0))
    reached.undo = lambda: calls.append("undone")
    reached.leave()
    assert calls == ["undone"]


async def test_a_pause_is_undone_once_its_caller_has_gone(llm: FakeLLM) -> None:
    weights = VLLMWeights(llm, "m")
    order = HostedOrder()
    await weights.pause("abort", order)
    order.leave()
    assert await asyncio.to_thread(llm.resumed.wait, 60)
    await weights.pause("abort", HostedOrder())
    await weights.resume()
    assert llm.log == [("pause", "abort", True), "resume"] * 2


async def test_a_pause_that_vllm_refuses_leaves_it_running(llm: FakeLLM, engine: VLLMEngine) -> None:
    async def refuse(*, mode: str, clear_cache: bool) -> None:
        raise RuntimeError("not now")

    llm.pause_generation = refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="not now"):
        await engine.pause()
    assert llm.log == ["resume"]

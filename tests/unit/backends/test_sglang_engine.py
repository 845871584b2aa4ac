"""`SGLangEngine` over a stand-in for SGLang, whose signatures are those of the real package."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from penstock import (
    ConfigurationError,
    EngineClosed,
    EngineOverloaded,
    ExecutionError,
    GenerationConfig,
    GrammarError,
    PackageMissing,
    RequestAborted,
    RequestError,
    RequestPriority,
    RequestTooLarge,
    SamplingParams,
    StructuredOutputs,
)
from penstock.api.protocols import Engine
from penstock.backends.sglang_engine import SGLangEngine
from penstock.backends.sglang_process import SGLang, start_sglang
from penstock.errors import EngineStateError, WeightsError
from penstock.testing.contract import EngineContract
from tests.unit.backends import fake_sglang
from tests.unit.backends.fake_sglang import VOCAB_SIZE, TokenizerManager, install

PARAMS = SamplingParams(temperature=0, max_tokens=4)
ATTEMPTS = 10  # at an order that has to come while a request runs


@pytest.fixture(autouse=True)
def _sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


class TestSGLangEngine(EngineContract):
    def make_engine(self) -> Engine:
        return SGLangEngine("m")


@pytest.fixture
def engine() -> Iterator[SGLangEngine]:
    engine = SGLangEngine("m", enable_deterministic_inference=True)
    engine.start()
    yield engine
    engine.stop(0)


@pytest.fixture
def manager(engine: SGLangEngine) -> TokenizerManager:
    return fake_sglang.Engine.made[-1].tokenizer_manager


async def test_a_request_in_sglangs_words(engine: SGLangEngine, manager: TokenizerManager) -> None:
    params = SamplingParams(
        **{"temperature": 0.5, "top_k": 3, "seed": 5, "stop": "x", "stop_token_ids": [8], "max_tokens": 3},
        **{"min_p": 0.1, "include_stop_str_in_output": True, "logprobs": 1},
    )
    output = await engine.generate("hi", params, namespace="one", priority=RequestPriority.HIGH)
    (call,) = manager.calls
    assert call["input_ids"] == [104, 105]
    assert (call["priority"], call["cache_salt"], call["stream"]) == (3, "one", True)
    assert (call["return_logprob"], call["logprob_start_len"], call["top_logprobs_num"]) == (True, -1, 1)
    sampling = call["sampling_params"]
    assert (sampling["temperature"], sampling["top_k"], sampling["min_p"]) == (0.5, 3, 0.1)
    assert (sampling["max_new_tokens"], sampling["stop"], sampling["stop_token_ids"]) == (3, ["x"], [8])
    assert (sampling["sampling_seed"], sampling["no_stop_trim"]) == (5, True)
    assert (output.prompt, output.prompt_token_ids, output.num_cached_tokens) == ("hi", [104, 105], 3)
    (completion,) = output.outputs
    assert (completion.token_ids, completion.text) == ([0, 1, 2], " 0 1 2")
    assert completion.token_logprobs == [-1.0] * 3
    assert completion.sampled_logprobs == []
    assert completion.logprobs is not None
    assert [set(row) for row in completion.logprobs] == [{0, 500}, {1, 500}, {2, 500}]
    assert (completion.logprobs[0][500].rank, completion.logprobs[0][500].logprob) == (1, -0.5)


@pytest.mark.parametrize(
    ("structured", "name", "value"),
    [
        (StructuredOutputs(json={"type": "integer"}), "json_schema", '{"type": "integer"}'),
        (StructuredOutputs(json_object=True), "json_schema", '{"type": "object"}'),
        (StructuredOutputs(regex="a+"), "regex", "a+"),
        (StructuredOutputs(choice=["a", 'b"\n']), "ebnf", 'start: "a" | "b\\"\\n"'),
        (StructuredOutputs(grammar='start: "a"'), "ebnf", 'start: "a"'),
    ],
)
async def test_structured_outputs_are_passed_on(
    engine: SGLangEngine, manager: TokenizerManager, structured: StructuredOutputs, name: str, value: str
) -> None:
    output = await engine.generate([1], SamplingParams(temperature=1.0, max_tokens=2, structured_outputs=structured))
    assert manager.calls[0]["sampling_params"][name] == value
    assert output.outputs[0].token_logprobs == []  # SGLang's are those under the grammar


async def test_samples_of_a_prompt_are_streams_with_seeds_of_their_own(
    engine: SGLangEngine, manager: TokenizerManager
) -> None:
    output = await engine.generate([1], SamplingParams(n=3, seed=7, max_tokens=2))
    assert [completion.token_ids for completion in output.outputs] == [[0, 1]] * 3
    seeds = [call["sampling_params"]["sampling_seed"] for call in manager.calls]
    ids = [call["rid"] for call in manager.calls]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert {len(stream_id) for stream_id in ids} == {32}  # none begins with another
    alike = await engine.generate([1], SamplingParams(n=3, temperature=0, max_tokens=2))
    assert [completion.token_ids for completion in alike.outputs] == [[0, 1]] * 3
    assert len(manager.calls) == 4
    assert alike.outputs[0].sampled_logprobs == [0.0, 0.0]


async def test_prompt_logprobs(engine: SGLangEngine, manager: TokenizerManager) -> None:
    output = await engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2))
    assert output.prompt_logprobs is not None
    first, second, third = output.prompt_logprobs
    assert first is None
    assert second is not None
    assert third is not None
    assert set(second) == {0, 1, 6}
    assert third[7].logprob == -7.0
    assert manager.calls[0]["top_logprobs_num"] == 2
    everything = await engine.generate([5, 6], SamplingParams(max_tokens=1, prompt_logprobs=-1))
    assert everything.prompt_logprobs is not None
    assert len(everything.prompt_logprobs[1] or ()) == VOCAB_SIZE


async def test_the_models_defaults_hold_for_a_request_without_parameters(
    engine: SGLangEngine, manager: TokenizerManager
) -> None:
    assert len((await engine.generate([1] * 1990)).generated_ids) == 10
    assert manager.calls[0]["sampling_params"]["top_k"] == 7
    await engine.generate([1], GenerationConfig(max_length=5, do_sample=False))
    assert manager.calls[1]["sampling_params"]["temperature"] == 0
    assert engine.default_params().top_k == 7


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logits_processors=[lambda ids, logits: logits]),
        SamplingParams(n=1, best_of=2),
        SamplingParams(rank_by="consensus"),
        SamplingParams(bad_words=["no"]),
        SamplingParams(allowed_token_ids=[1]),
        SamplingParams(temperature=1e-9),
        SamplingParams(repetition_penalty=3.0),
        SamplingParams(stop=[str(number) for number in range(33)]),
        SamplingParams(logprobs=1, presence_penalty=1.0),
        SamplingParams(logprobs=1, min_tokens=1),
        SamplingParams(structured_outputs=StructuredOutputs(json_object=True, whitespace_pattern=" ?")),
    ],
)
async def test_what_sglang_cannot_do_is_refused_before_anything_runs(
    engine: SGLangEngine, manager: TokenizerManager, params: SamplingParams
) -> None:
    with pytest.raises(RequestError, match="SGLang"):
        engine.generate([1], params)
    assert not manager.calls


def test_a_seed_needs_an_engine_that_heeds_it() -> None:
    with pytest.raises(RequestError, match="enable_deterministic_inference=True"):
        SGLangEngine("m").generate([1], SamplingParams(seed=3))


async def test_errors_of_sglang_are_typed(engine: SGLangEngine, manager: TokenizerManager) -> None:
    grammar = StructuredOutputs(regex="(")
    cases: list[tuple[type[Exception], str, list[int], SamplingParams]] = [
        (RequestError, "an unlucky token", [13], PARAMS),
        (RequestError, "outside the model's vocabulary of 1000", [VOCAB_SIZE], PARAMS),
        (RequestTooLarge, "context_length of 2000", [1] * 1999, PARAMS),
        (RequestTooLarge, "shorten the prompt", [1] * 2000, PARAMS),
        (GrammarError, "invalid grammar", [1], SamplingParams(max_tokens=2, structured_outputs=grammar)),
        (EngineOverloaded, "queue is full", [1], SamplingParams(max_tokens=2, stop=["overload"])),
    ]
    for kind, words, ids, params in cases:
        with pytest.raises(kind, match=words):
            await engine.generate(ids, params)

    def fail() -> Any:
        raise KeyError("lost")

    manager.step = fail
    with pytest.raises(ExecutionError, match=r"SGLang failed: KeyError: 'lost'"):
        await engine.generate([1], PARAMS)


async def test_an_abort_keeps_what_sglang_had_not_handed_out(engine: SGLangEngine, manager: TokenizerManager) -> None:
    manager.step = lambda: asyncio.sleep(0.01)
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
    assert len(manager.closed) == 2


async def test_a_request_without_a_token_ends_at_once(engine: SGLangEngine, manager: TokenizerManager) -> None:
    manager.step = asyncio.Event().wait
    handle = engine.generate([1], PARAMS)
    handle.cancel()
    with pytest.raises(RequestAborted):
        await handle


# The process and its children.


def test_starting_leaves_the_process_as_it_was() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]
    before = dict(os.environ), multiprocessing.get_start_method(allow_none=True), list(logging.root.handlers)
    policy = asyncio.get_event_loop_policy()
    engine = SGLangEngine("some/model", dtype="float32", tp_size=2)
    engine.start()
    made = fake_sglang.Engine.made[-1]
    assert (dict(os.environ), multiprocessing.get_start_method(allow_none=True), list(logging.root.handlers)) == before
    assert asyncio.get_event_loop_policy() is policy
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)] == handlers
    options = made.server_args
    assert (options.model_path, options.dtype, options.tp_size) == ("some/model", "float32", 2)
    assert (options.enable_priority_scheduling, options.grammar_backend) == (True, "llguidance")
    assert made.environment["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "1"  # for SGLang's processes
    assert made.tokenizer_manager.log == ["watchdog stopped"]
    assert made.loop.is_closed()
    engine.stop()


async def test_a_request_that_ends_while_sglang_starts_does_not_start_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first engine went on loading, belonged to nobody and was never ended."""
    begun, may_end = threading.Event(), threading.Event()

    def start(*arguments: Any) -> SGLang:
        begun.set()
        assert may_end.wait(60)
        return start_sglang(*arguments)

    monkeypatch.setattr("penstock.backends.sglang_engine.start_sglang", start)
    engine = SGLangEngine("m")
    first = engine.generate([1], PARAMS)
    assert await asyncio.to_thread(begun.wait, 60)
    first.cancel()
    with pytest.raises(RequestAborted):
        await first
    second = engine.generate([1], PARAMS)
    may_end.set()
    assert (await second).generated_ids == [0, 1, 2, 3]
    assert len(fake_sglang.Engine.made) == 1
    await asyncio.to_thread(engine.stop, 0)


async def test_a_dead_process_fails_every_waiter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_sglang.Engine, "num_processes", 2)
    earlier = set(multiprocessing.active_children())
    async with SGLangEngine(str(folder(tmp_path / "model"))) as engine:
        manager = fake_sglang.Engine.made[-1].tokenizer_manager
        manager.step = lambda: asyncio.sleep(0.01)
        running = engine.generate([1], SamplingParams(temperature=0, max_tokens=1900))
        await anext(running)
        manager.step = asyncio.Event().wait
        manager.pause_generation = lambda obj: asyncio.Event().wait()  # type: ignore[assignment]
        waiters: list[Any] = [asyncio.ensure_future(engine.generate([1], PARAMS)), asyncio.ensure_future(running)]
        waiters.append(asyncio.ensure_future(engine.update_weights(tmp_path / "model", mode="abort")))
        first, second = set(multiprocessing.active_children()) - earlier
        first.kill()
        results = await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), 60)
        assert [type(result) for result in results] == [EngineClosed] * 3
        with pytest.raises(EngineClosed, match="process of SGLang ended"):
            await engine.generate([1], PARAMS)
        assert second.is_alive()
    assert not second.is_alive()


def test_a_failed_start_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_sglang.Engine, "num_processes", 1)
    monkeypatch.setattr(fake_sglang.Engine, "fault", "CUDA is missing")
    before = set(multiprocessing.active_children())
    with pytest.raises(ConfigurationError, match="SGLang cannot start m: RuntimeError: CUDA is missing"):
        SGLangEngine("m").start()
    assert set(multiprocessing.active_children()) == before


def test_without_sglang_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageMissing, match="pip install sglang"):
        SGLangEngine("some/model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_priority_scheduling": False}, "ignores priorities"),
        ({"dp_size": 2}, "make several engines"),
        ({"model_path": "m"}, "first argument"),
    ],
)
def test_options_that_would_falsify_results_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        SGLangEngine("some/model", **options)


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="SGLang has no option 'tp_siz': did you mean 'tp_size'"):
        SGLangEngine("some/model", tp_siz=2).start()


# Scores and prefixes.


async def test_a_score_is_that_of_the_completion_alone(engine: SGLangEngine, manager: TokenizerManager) -> None:
    first, second = await engine.score([[9, 9, 9], "ab"], [[1, 2], [3]], namespace="n")
    assert first.logprobs.tolist() == [-1.0, -2.0]
    assert second.logprobs.tolist() == [-3.0]
    assert first.tempered is None
    call = manager.calls[0]
    assert (call["input_ids"], call["logprob_start_len"], call["top_logprobs_num"]) == ([9, 9, 9, 1, 2], 2, 0)
    assert call["sampling_params"]["max_new_tokens"] == 0
    assert call["cache_salt"] == "n"
    (whole,) = await engine.score([[9]], [[1, 2]], params=SamplingParams(temperature=0.5), entropies=True)
    assert manager.calls[-1]["top_logprobs_num"] == VOCAB_SIZE
    assert whole.entropies is not None
    row = np.array([-1.0 / (1 + token) for token in range(VOCAB_SIZE)])
    likely = np.exp(row - np.log(np.exp(row).sum()))
    np.testing.assert_allclose(whole.entropies, -(likely * np.log(likely)).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"completions": [[1], [2]]}, "1 prompts and 2 completions"),
        ({"completions": [[]]}, "at least one token"),
        ({"completions": [[1]], "logits": True}, "no logits"),
        ({"completions": [[1]], "params": SamplingParams(min_p=0.1)}, "SGLang cannot score with min_p"),
    ],
)
async def test_what_cannot_be_scored_is_refused(engine: SGLangEngine, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        await engine.score([[1]], **arguments)


async def test_prefixes_are_forgotten_while_no_request_runs(engine: SGLangEngine, manager: TokenizerManager) -> None:
    await asyncio.to_thread(engine.reset_prefix_cache)
    manager.is_idle = False
    with pytest.raises(EngineStateError, match="2 requests are running"):
        await asyncio.to_thread(engine.reset_prefix_cache)
    assert manager.log.count("flush") == 2
    assert await engine.tokenize("ab") == [97, 98]
    assert await engine.detokenize([97, 98]) == "ab"


# Weights.


def folder(path: Path, **shapes: tuple[int, ...]) -> Path:
    """A folder with weights of these shapes."""
    path.mkdir()
    shapes = shapes or {"a": (2, 3), "b": (4,)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path / "model.safetensors")
    return path


async def test_an_update_pauses_loads_and_goes_on(tmp_path: Path) -> None:
    model, new = folder(tmp_path / "model"), folder(tmp_path / "new")
    async with SGLangEngine(model) as engine:
        manager = fake_sglang.Engine.made[-1].tokenizer_manager
        for version, mode, pause in ((1, "wait", "retract"), (2, "keep", "retract"), (3, "abort", "abort")):
            manager.log.clear()
            assert await engine.update_weights(new, mode=mode) == engine.weight_version == version  # type: ignore[arg-type]
            assert manager.log == [("pause", pause), ("load", str(new), str(version)), "continue"]
        output = await engine.generate([1], PARAMS)
    assert output.outputs[0].weight_versions == [3] * 4
    assert engine.weight_version == 3


async def test_a_request_that_is_kept_has_the_version_of_every_token(tmp_path: Path) -> None:
    async with SGLangEngine(folder(tmp_path / "model")) as engine:
        versions: list[int] = []
        for version in range(ATTEMPTS):  # it may have ended when the update comes
            handle = engine.generate([1], SamplingParams(temperature=0, max_tokens=60))
            await anext(handle)
            await engine.update_weights(tmp_path / "model", mode="keep")
            versions = (await handle).outputs[0].weight_versions
            if set(versions) == {version, version + 1}:
                break
        assert set(versions) == {version, version + 1}
        assert versions == sorted(versions)
        waiting = engine.generate([1], SamplingParams(temperature=0, max_tokens=60))
        await anext(waiting)
        await engine.update_weights(tmp_path / "model", mode="wait")
        assert (await waiting).outputs[0].weight_versions == [version + 1] * 60


async def test_an_update_ends_requests_with_what_they_have(tmp_path: Path) -> None:
    async with SGLangEngine(folder(tmp_path / "model")) as engine:
        fake_sglang.Engine.made[-1].tokenizer_manager.step = lambda: asyncio.sleep(0.01)
        handle = engine.generate([1], SamplingParams(temperature=0, max_tokens=1900))
        await anext(handle)
        await engine.update_weights(tmp_path / "model")
        with pytest.raises(RequestAborted) as caught:
            await handle
        assert caught.value.output is not None
        assert 0 < len(caught.value.output.generated_ids) < 1900


async def test_a_caller_who_leaves_an_update_that_waits_takes_it_back(tmp_path: Path) -> None:
    async with SGLangEngine(str(folder(tmp_path / "model"))) as engine:
        manager = fake_sglang.Engine.made[-1].tokenizer_manager
        manager.step = lambda: asyncio.sleep(0.01)
        running = engine.generate([1], SamplingParams(temperature=0, max_tokens=1900))
        await anext(running)
        update = asyncio.ensure_future(engine.update_weights(tmp_path / "model", mode="wait"))
        await engine.tokenize("a")  # the update has had its turn of the loop
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update
        running.cancel()
        assert (await engine.generate([1], PARAMS)).outputs[0].weight_versions == [0] * 4
        assert await engine.update_weights(tmp_path / "model", mode="wait") == 1
    assert [entry for entry in manager.log if isinstance(entry, tuple) and entry[0] == "load"] == [
        ("load", str(tmp_path / "model"), "1")
    ]


async def test_weights_that_fail_to_load_are_taken_back(tmp_path: Path) -> None:
    model, new = folder(tmp_path / "model"), folder(tmp_path / "new")
    async with SGLangEngine(model) as engine:
        manager = fake_sglang.Engine.made[-1].tokenizer_manager
        manager.load = lambda path: path == str(model)
        with pytest.raises(WeightsError, match=r"SGLang cannot load .*: no such layer") as caught:
            await engine.update_weights(new)
        assert not caught.value.is_mixed
        assert engine.weight_version == 0
        assert manager.log[-2:] == [("load", str(model), "0"), "continue"]
        manager.load = lambda path: False
        with pytest.raises(WeightsError, match="weights of two kinds: stop this engine") as caught:
            await engine.update_weights(new)
        assert caught.value.is_mixed


async def test_pauses_come_in_pairs(engine: SGLangEngine, manager: TokenizerManager) -> None:
    await engine.pause("keep")
    with pytest.raises(EngineStateError):
        await engine.pause()
    await engine.resume()
    with pytest.raises(EngineStateError):
        await engine.resume()
    with pytest.raises(RequestError, match="unknown"):
        await engine.pause("never")  # type: ignore[arg-type]
    assert manager.log[1:] == [("pause", "retract"), "continue"]


# Adapters.


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


async def test_a_request_has_the_adapter_that_it_names(adapter: Path) -> None:
    async with SGLangEngine("m", enable_lora=True, max_lora_rank=8, lora_target_modules=["q_proj"]) as engine:
        manager = fake_sglang.Engine.made[-1].tokenizer_manager
        assert engine.adapters == []
        await engine.load_adapter("policy", adapter)
        assert engine.adapters == ["policy"]
        assert engine.adapter_generation("policy") == 1
        running = engine.generate([1], SamplingParams(temperature=0, max_tokens=60), adapter="policy")
        await anext(running)
        await engine.load_adapter("policy", str(adapter))
        await engine.generate([1], PARAMS, adapter="policy")
        await engine.score([[1]], [[2]], adapter="policy")
        await engine.generate([1], PARAMS)
        first, *others = (call["lora_path"] for call in manager.calls)
        assert first != others[0] == others[1]
        assert others[2] is None
        assert len((await running).generated_ids) == 60  # with what it had
        while ("unload", first) not in manager.log:  # noqa: ASYNC110 - on the engine's loop, after the request's end
            await asyncio.sleep(0.001)
        await engine.unload_adapter("policy")
        assert engine.adapters == []
        assert engine.adapter_generation("policy") == 0
        assert [entry for entry in manager.log if entry[0] == "unload"] == [("unload", first), ("unload", others[0])]


async def test_unloading_an_adapter_lets_its_requests_end(adapter: Path) -> None:
    async with SGLangEngine("m", enable_lora=True) as engine:
        await engine.load_adapter("policy", adapter)
        handles = [
            engine.generate([1], SamplingParams(temperature=0, max_tokens=1900), adapter=name)
            for name in ("policy", "")
        ]
        for handle in handles:
            await anext(handle)
        unload = asyncio.ensure_future(engine.unload_adapter("policy"))
        while engine.adapters:  # until it has begun
            await engine.generate([1], PARAMS)
        with pytest.raises(RequestError, match="is not loaded"):
            await engine.generate([1], PARAMS, adapter="policy")
        assert not unload.done()
        assert [len((await handle).generated_ids) for handle in handles] == [1900, 1900]
        await unload


async def test_adapters_that_are_none_are_refused(engine: SGLangEngine, adapter: Path) -> None:
    with pytest.raises(RequestError, match=r"adapter 'policy' is not loaded \(there is none\)"):
        await engine.generate([1], PARAMS, adapter="policy")
    with pytest.raises(RequestError, match="is not loaded"):
        await engine.unload_adapter("policy")
    for name in ("", 3):
        with pytest.raises(RequestError, match="name"):
            await engine.load_adapter(name, adapter)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="from folders"):
        await engine.load_adapter("policy", object())
    with pytest.raises(WeightsError, match=r"no adapter_config\.json"):
        await engine.load_adapter("policy", adapter / "none")
    with pytest.raises(WeightsError, match="LoRA is not enabled"):
        await engine.load_adapter("policy", adapter)
    assert engine.adapters == []

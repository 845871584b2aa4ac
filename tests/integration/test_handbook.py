"""The engine of the inference handbook: its snippets run as they are written there, and keep its promises.

Numbers like 004-26 in the docstrings are the rows of the requirements checklist, those like B4-7 bugs of an earlier
engine that must not come back. Comments and blank lines of the snippets are left out.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock import (
    DeadlineExceeded,
    EngineClosed,
    EngineConfig,
    EngineOverloaded,
    ExecutionError,
    GenerationConfig,
    InferenceEngine,
    InferenceRequest,
    RequestError,
    RequestOutput,
    RequestPriority,
    RequestTooLarge,
    SamplingParams,
    ScriptedModel,
)
from penstock.api.channel import RequestStatus
from tests.drive import greedy_by_transformers
from tests.scripted_engine import HoldingModel
from tests.tiny_models import build
from tests.tokenizers_for_tests import byte_level

PATIENCE_S = 30.0
TOKENIZER = byte_level()
IDS = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id, "max_position_embeddings": 96}
EOS = TOKENIZER.eos_token_id
TWO = GenerationConfig(max_length=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer Llama and its tokenizer, as `save_pretrained` writes them."""
    path = str(tmp_path_factory.mktemp("tiny"))
    build("llama", vocab_size=len(TOKENIZER), **IDS).save_pretrained(path)  # type: ignore[operator]
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[InferenceEngine, HoldingModel]]]:
    """Makes engines over a `ScriptedModel` that says "ok" again and again, unless told otherwise."""
    made: list[InferenceEngine] = []

    def make(script: Any = None, hold_at: int = 0, **settings: Any) -> tuple[InferenceEngine, HoldingModel]:
        words = TOKENIZER.encode("ok", add_special_tokens=False)
        model = HoldingModel(script or words, hold_at=hold_at, max_length=2048, eos_token_ids=frozenset({EOS}))
        made.append(InferenceEngine(model, TOKENIZER, EngineConfig(**settings)))
        return made[-1], model

    yield make
    for engine in made:
        engine.stop(0.0)


Make = Callable[..., tuple[InferenceEngine, HoldingModel]]


def run(source: str, **names: Any) -> SimpleNamespace:
    """Run a snippet as a script; its variables, and what it printed as `printed`."""
    printed: list[str] = []
    names |= {"__name__": "__main__", "print": lambda *words: printed.append(" ".join(map(str, words)))}
    exec(compile(source.replace("from inference.engine import", "from penstock import"), "<handbook>", "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if name.isidentifier()}, printed=printed)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE_S
    pulse = threading.Event()
    while not condition():
        assert monotonic() < deadline, "the condition did not come true in time"
        pulse.wait(0.002)


def result_of(engine: InferenceEngine, request_id: str) -> RequestOutput:
    handle = engine.get_request(request_id)
    assert handle is not None
    return handle.result(PATIENCE_S)


def hold_one(engine: InferenceEngine, model: ScriptedModel, **options: Any) -> str:
    """Submit a request and wait until the model is held within its first step."""
    model.hold()
    request_id = engine.submit_request("first", **options)
    wait_until(lambda: model.plans == 1)
    return request_id


# Construction, life, submission.

INTRODUCTION = """
from inference.engine import InferenceEngine, EngineConfig, GenerationConfig
config = EngineConfig(
    max_batch_size=32,
    max_sequence_length=2048,
    enable_kv_cache=True,
    batch_timeout_ms=50.0
)
engine = InferenceEngine(model, tokenizer, config)
engine.start()
request_id = engine.submit_request(
    "What is the capital of France?",
    generation_config=GenerationConfig(max_length=100, temperature=0.8)
)
"""


def test_the_introduction_runs_with_a_live_model() -> None:
    """004-18, 004-19, 004-21, 004-55, 004-56: `InferenceEngine(model, tokenizer, config)`."""
    found = run(INTRODUCTION, model=build("llama", vocab_size=len(TOKENIZER), **IDS), tokenizer=TOKENIZER)
    output = result_of(found.engine, found.request_id)
    assert output.prompt == "What is the capital of France?"
    assert output.outputs[0].finish_reason in ("stop", "length")
    assert 1 <= len(output.generated_ids) <= 100
    assert output.text == TOKENIZER.decode(output.generated_ids, skip_special_tokens=True)
    found.engine.stop()


QUICK_START = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from inference.engine import InferenceEngine, EngineConfig
model = AutoModelForCausalLM.from_pretrained("your-model")
tokenizer = AutoTokenizer.from_pretrained("your-model")
config = EngineConfig(
    max_batch_size=16,
    enable_kv_cache=True,
    enable_metrics=True,
    batch_timeout_ms=50.0
)
engine = InferenceEngine(model, tokenizer, config)
engine.start()
try:
    request_id = engine.submit_request("Hello, how are you today?")
finally:
    engine.stop()
"""


def test_the_quick_start_serves_what_it_submitted_before_it_stops(folder: str) -> None:
    """004-20, 004-22, 004-105: stopping "gracefully" (an earlier engine dropped queued requests)."""
    found = run(QUICK_START.replace("your-model", folder))
    assert found.engine.get_request_status(found.request_id) is RequestStatus.COMPLETED
    assert len(result_of(found.engine, found.request_id).generated_ids) >= 1
    assert found.engine.get_stats()["engine_status"] == "stopped"
    with pytest.raises(EngineClosed, match="stopped"):
        found.engine.submit_request("too late")


def test_stop_serves_the_running_and_the_waiting(scripted: Make) -> None:
    """004-20."""
    engine, model = scripted(max_batch_size=1)
    ids = [hold_one(engine, model)] + [engine.submit_request("next") for _ in range(3)]
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    model.release()
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    assert [engine.get_request_status(request_id) for request_id in ids] == [RequestStatus.COMPLETED] * 4
    engine.stop()


def test_stop_without_drain_ends_every_waiter_with_an_error(scripted: Make) -> None:
    """004-20: futures always resolve."""
    engine, model = scripted(max_batch_size=1)
    ids = [hold_one(engine, model), engine.submit_request("next")]
    handles = [engine.get_request(request_id) for request_id in ids]
    stopping = threading.Thread(target=engine.stop, args=(0.0,))
    stopping.start()
    model.release()
    stopping.join(PATIENCE_S)
    for handle in handles:
        assert handle is not None
        with pytest.raises(Exception, match=r"aborted|stopped"):
            handle.result(PATIENCE_S)


def test_both_spellings_and_the_positional_order_of_the_reference_work(scripted: Make) -> None:
    """004-24, 004-27: `submit_request(text, config, priority, callback)` of the reference, keywords of the examples."""
    engine, _ = scripted()
    results: list[RequestOutput] = []
    two = GenerationConfig(max_length=2)
    ids = [
        engine.submit_request("a", two, RequestPriority.HIGH, results.append),
        engine.submit_request(text="a", config=two, priority=RequestPriority.LOW, callback=results.append),
        engine.submit_request("a", generation_config=two),
        engine.submit_request("a", config=SamplingParams(max_tokens=2)),
    ]
    assert [len(result_of(engine, request_id).generated_ids) for request_id in ids] == [2] * 4
    wait_until(lambda: len(results) == 2)
    assert {output.request_id for output in results} == set(ids[:2])

    async def waiting() -> list[RequestOutput]:
        return [
            await engine.submit_request_async("a", two, RequestPriority.HIGH),
            await engine.submit_request_async(text="a", config=two, priority=RequestPriority.HIGH),
            await engine.submit_request_async("a", generation_config=two),
        ]

    assert [len(output.generated_ids) for output in asyncio.run(waiting())] == [2] * 3


def test_the_callback_gets_the_result_once_and_may_call_the_engine(scripted: Make) -> None:
    """004-15, 004-25, B4-8: an earlier engine called back under its lock, and such a callback was a deadlock."""
    engine, _ = scripted()
    calls: list[tuple[str, str, int]] = []

    def callback(output: RequestOutput) -> None:
        assert engine.get_request_status(output.request_id) is RequestStatus.COMPLETED
        calls.append((output.text, engine.get_stats()["engine_status"], len(calls)))
        if len(calls) < 3:
            engine.submit_request("again", GenerationConfig(max_length=2), callback=callback)

    engine.submit_request("once", GenerationConfig(max_length=2), callback=callback)
    wait_until(lambda: len(calls) == 3)
    engine.stop()
    assert calls == [("ok", "running", 0), ("ok", "running", 1), ("ok", "running", 2)]


def test_the_callback_of_a_failed_request_gets_the_error(scripted: Make) -> None:
    """004-25, 004-30."""
    engine, model = scripted()
    results: list[RequestOutput] = []
    model.fail_next(OSError("unplugged"))
    engine.submit_request("a", callback=results.append)
    wait_until(lambda: len(results) == 1)
    assert results[0].outputs[0].finish_reason == "error"
    assert "unplugged" in (results[0].error or "")


ASYNC = """
import asyncio
from inference.engine import RequestPriority
async def async_inference():
    result = await engine.submit_request_async(
        "Urgent: What is 2+2?",
        priority=RequestPriority.HIGH
    )
    print(f"Generated: {tokenizer.decode(result.output_ids[0])}")
asyncio.run(async_inference())
"""


def test_the_async_example_starts_the_engine_by_itself(scripted: Make) -> None:
    """004-16, 004-26, 004-28, 004-29: `output_ids[0]` is a row of prompt and output ids."""
    engine, _ = scripted(default_max_tokens=2)
    assert engine.get_stats()["engine_status"] == "stopped"
    found = run(ASYNC, engine=engine, tokenizer=TOKENIZER)
    assert found.printed == ["Generated: <s>Urgent: What is 2+2?ok"]
    assert engine.get_stats()["engine_status"] == "running"


def test_an_awaiter_wakes_although_its_loop_is_otherwise_idle(scripted: Make) -> None:
    """004-16, B4-7: an earlier engine completed the future from its own thread, which wakes no loop."""
    engine, _ = scripted(default_max_tokens=2)
    texts: list[str] = []

    async def only_this() -> None:  # no timer, no other task: nothing else could wake the loop
        texts.append((await engine.submit_request_async("a")).text)

    waiting = threading.Thread(target=lambda: asyncio.run(only_this()), daemon=True)
    waiting.start()
    waiting.join(PATIENCE_S)
    assert texts == ["ok"]


def test_requests_come_from_many_threads(scripted: Make) -> None:
    """004-15."""
    engine, _ = scripted()
    found: list[list[str]] = []

    def client() -> None:
        ids = [engine.submit_request("a", GenerationConfig(max_length=2)) for _ in range(10)]
        found.append([result_of(engine, request_id).text for request_id in ids])

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == [["ok"] * 10] * 8
    assert engine.get_stats()["totals"]["requests"] == 80


def test_the_callback_gets_an_inference_request_with_every_field(scripted: Make) -> None:
    """004-67, but for `kv_cache`: K/V stays in blocks that requests share."""
    engine, _ = scripted()
    results: list[InferenceRequest] = []
    config, metadata = GenerationConfig(max_length=3), {"user": 7}
    before = time.time()
    request_id = engine.submit_request("a", config, RequestPriority.HIGH, results.append, metadata)
    wait_until(lambda: len(results) == 1)
    (request,) = results
    prompt = TOKENIZER.encode("a")
    assert (request.request_id, request.status, request.error) == (request_id, RequestStatus.COMPLETED, None)
    assert (request.input_ids, request.attention_mask) == ([prompt], [[1] * len(prompt)])
    assert (request.generation_config, request.priority) == (config, RequestPriority.HIGH)
    assert (request.callback, request.metadata) == (results.append, metadata)
    assert request.output_ids == [prompt + request.generated_ids]
    assert request.generated_length == 3
    assert request.processing_start is not None
    assert request.processing_end is not None
    assert before <= request.created_at <= request.processing_start <= request.processing_end <= time.time() + 1
    assert not hasattr(request, "kv_cache")


async def test_an_awaited_inference_request_knows_what_was_submitted(scripted: Make) -> None:
    """004-67: it is a `RequestOutput`, too."""
    engine, _ = scripted()
    request = await engine.submit_request_async("a", priority=RequestPriority.LOW, metadata={"user": 7}, config=TWO)
    assert isinstance(request, RequestOutput)
    assert (request.text, request.metadata, request.generation_config) == ("ok", {"user": 7}, TWO)
    assert (request.priority, request.status, request.callback) == (RequestPriority.LOW, RequestStatus.COMPLETED, None)
    with pytest.raises(RequestError, match="metadata must be a mapping, got 3"):
        await engine.submit_request_async("a", metadata=3)  # type: ignore[arg-type]


def test_the_inference_request_of_a_failure_has_its_status_and_error(scripted: Make) -> None:
    """004-67, B4-6."""
    engine, model = scripted(max_batch_size=1)
    results: list[InferenceRequest] = []
    first = hold_one(engine, model, callback=results.append)
    second = engine.submit_request("second", callback=results.append)
    engine.abort(second)
    wait_until(lambda: len(results) == 1)
    model.fail_next(OSError("unplugged"))
    model.release()
    wait_until(lambda: len(results) == 2)
    assert [(request.request_id, request.status.name) for request in results] == [
        (second, "CANCELLED"),
        (first, "FAILED"),
    ]
    assert "unplugged" in (results[1].error or "")
    assert results[0].processing_start is None


def test_submitted_requests_take_what_generate_takes(scripted: Make) -> None:
    """004-24, 004-26: an id, deadlines and a namespace."""
    engine, model = scripted()
    assert engine.submit_request("a", TWO, request_id="mine") == "mine"
    assert result_of(engine, "mine").text == "ok"
    prompt = list(range(40, 80))

    async def cached_tokens(namespace: str) -> int:
        output = await engine.submit_request_async(prompt, TWO, namespace=namespace, request_id=f"in {namespace}")
        assert output.request_id == f"in {namespace}"
        return output.num_cached_tokens

    assert [asyncio.run(cached_tokens(name)) for name in ("one", "one", "two")] == [0, 32, 0]
    model.hold()
    for deadline in ({"deadline": 0.05}, {"ttft_deadline": 0.05}):
        with pytest.raises(DeadlineExceeded):
            asyncio.run(engine.submit_request_async("a", **deadline))
    model.release()


# Status, failures, limits.


def test_status_goes_from_queued_to_completed(scripted: Make) -> None:
    """004-30, 004-67."""
    engine, model = scripted(max_batch_size=1)
    first = hold_one(engine, model, generation_config=GenerationConfig(max_length=2))
    second = engine.submit_request("second", GenerationConfig(max_length=2))
    third = engine.submit_request("third")
    wait_until(lambda: engine.get_stats()["queue"]["num_waiting"] == 2)
    engine.abort(third)
    model.release()
    result_of(engine, second)
    names = ("QUEUED", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED")
    assert [status.name for status in RequestStatus] == list(names)
    assert engine.get_request_status(first) is RequestStatus.COMPLETED
    assert engine.get_request_status(third) is RequestStatus.CANCELLED
    assert engine.get_request_status("never heard of") is None


def test_a_held_request_is_processing_and_the_next_is_queued(scripted: Make) -> None:
    """004-30."""
    engine, model = scripted(max_batch_size=1)
    first = hold_one(engine, model)
    second = engine.submit_request("second")
    assert engine.get_request_status(first) is RequestStatus.PROCESSING
    assert engine.get_request_status(second) is RequestStatus.QUEUED
    model.release()


def test_a_failed_request_is_failed_and_its_awaiter_raises(scripted: Make) -> None:
    """004-30, B4-6: an earlier engine reported failures as completed and never told the waiter."""
    engine, model = scripted(default_max_tokens=2)
    model.fail_next(OSError("unplugged"))
    request_id = engine.submit_request("a")
    with pytest.raises(ExecutionError, match="unplugged"):
        result_of(engine, request_id)
    assert engine.get_request_status(request_id) is RequestStatus.FAILED
    model.fail_next(OSError("unplugged"))
    with pytest.raises(RuntimeError, match="unplugged"):
        asyncio.run(engine.submit_request_async("a"))
    assert asyncio.run(engine.submit_request_async("a")).text == "ok"


def test_a_full_queue_refuses_the_next_request_at_once(scripted: Make) -> None:
    """004-54: a RuntimeError that says "Request queue is full"."""
    engine, model = scripted(max_batch_size=1, max_queue_size=2, default_max_tokens=2)
    hold_one(engine, model)
    waiting = [engine.submit_request("next") for _ in range(2)]
    with pytest.raises(RuntimeError, match="Request queue is full") as caught:
        engine.submit_request("one too many")
    assert isinstance(caught.value, EngineOverloaded)
    assert caught.value.retry_after_s > 0
    model.release()
    assert [result_of(engine, request_id).text for request_id in waiting] == ["ok"] * 2
    engine.submit_request("room again")


PRIORITIES = """
from inference.engine import RequestPriority
urgent_id = engine.submit_request(
    "Critical system alert!",
    priority=RequestPriority.CRITICAL
)
normal_id = engine.submit_request(
    "Regular query",
    priority=RequestPriority.NORMAL
)
"""


def test_critical_requests_are_processed_first(scripted: Make) -> None:
    """004-10, 004-23, 004-63 to 004-66: with one slot, the order is by class, then by arrival."""
    served: list[str] = []

    def script(tokens: Any, index: int) -> int:
        served.append(str(TOKENIZER.decode(list(tokens), skip_special_tokens=True)))
        return int(EOS)

    engine, model = scripted(script, max_batch_size=1)
    hold_one(engine, model)
    engine.submit_request("low", priority=RequestPriority.LOW)
    engine.submit_request("normal")
    engine.submit_request("high", priority=RequestPriority.HIGH)
    run(PRIORITIES, engine=engine)
    wait_until(lambda: engine.get_stats()["queue"]["num_waiting"] == 5)
    model.release()
    wait_until(lambda: len(served) == 6)
    assert served == ["first", "Critical system alert!", "high", "normal", "Regular query", "low"]
    assert [int(priority) for priority in RequestPriority] == [1, 2, 3, 4]


# GenerationConfig.

GENERATION = """
from inference.engine import GenerationConfig
gen_config = GenerationConfig(
    max_length=512,
    temperature=0.8,
    top_k=50,
    top_p=0.9,
    repetition_penalty=1.1,
    do_sample=True,
    early_stopping=True
)
request_id = engine.submit_request(
    "Write a creative story",
    generation_config=gen_config
)
"""


@pytest.fixture(scope="module")
def tiny() -> Iterator[InferenceEngine]:
    """A live random model in an engine."""
    model = build("llama", vocab_size=len(TOKENIZER), **IDS)
    engine = InferenceEngine(model, TOKENIZER, EngineConfig(max_batch_size=8))
    yield engine
    engine.stop(0.0)


def test_custom_generation_parameters_are_honoured(tiny: InferenceEngine) -> None:
    """004-55 to 004-62: `max_length` counts new tokens, cut to what fits."""
    output = result_of(tiny, run(GENERATION, engine=tiny).request_id)
    assert len(output.generated_ids) <= 96 - len(output.prompt_token_ids)
    everything = GenerationConfig(min_length=1, length_penalty=1.0, num_beams=1, pad_token_id=0, use_cache=True)
    assert (everything.max_length, everything.temperature, everything.top_k, everything.top_p) == (512, 1.0, 50, 0.9)
    assert (everything.repetition_penalty, everything.do_sample, everything.early_stopping) == (1.0, True, True)
    with pytest.raises(RequestError, match=r"num_beams=4.*do_sample=False"):
        GenerationConfig(num_beams=4)
    beams = GenerationConfig(num_beams=4, num_return_sequences=2, do_sample=False, max_length=8)
    found = tiny.submit_request("Write a creative story", generation_config=beams)
    assert len(result_of(tiny, found).outputs) == 2


def test_every_request_of_a_batch_has_its_own_parameters(scripted: Make) -> None:
    """004-55, B4-2 (the first request's parameters for all), B4-3 (no stop until all rows stopped)."""
    engine, model = scripted(lambda tokens, index: EOS if len(tokens) == 10 else 70, max_batch_size=8)
    model.hold()
    lengths = [1, 3, 5, 40]
    ids = [engine.submit_request("a", GenerationConfig(max_length=length)) for length in lengths]
    wait_until(lambda: engine.get_stats()["queue"]["num_requests"] == len(ids))
    model.release()
    outputs = [result_of(engine, request_id) for request_id in ids]
    prompt = len(outputs[0].prompt_token_ids)
    assert [len(output.generated_ids) for output in outputs] == [1, 3, 5, 11 - prompt]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 3 + ["stop"]
    assert outputs[3].generated_ids.count(EOS) == 1


def test_length_may_count_the_prompt_too(tiny: InferenceEngine) -> None:
    """004-55: `length_mode="total"`; a prompt that leaves no room is an error, never an empty text."""
    prompt = TOKENIZER.encode("Water falls")
    total = GenerationConfig(max_length=len(prompt) + 3, length_mode="total", do_sample=False)
    output = asyncio.run(tiny.submit_request_async(prompt, total))
    assert len(output.output_ids[0]) <= len(prompt) + 3
    with pytest.raises(RequestTooLarge, match="max_length=2 leaves no room"):
        asyncio.run(tiny.submit_request_async(prompt, GenerationConfig(max_length=2, length_mode="total")))
    with pytest.raises(RequestTooLarge):
        asyncio.run(tiny.submit_request_async([5] * 300))


def test_a_batch_of_unequal_prompts_equals_one_by_one(tiny: InferenceEngine) -> None:
    """004-11, B4-1: an earlier engine padded on the right and continued every shorter row from a pad."""
    model = build("llama", vocab_size=len(TOKENIZER), **IDS)
    texts = ["a", "Water falls from the upper lake", "The turbine", "If the gate closes too fast, the water strikes"]

    async def together() -> list[RequestOutput]:
        greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        return await asyncio.gather(*(tiny.submit_request_async(text, greedy) for text in texts))

    for text, output in zip(texts, asyncio.run(together()), strict=True):
        assert output.generated_ids == greedy_by_transformers(model, TOKENIZER.encode(text), 8)


def test_sampling_is_off_with_do_sample_false(tiny: InferenceEngine) -> None:
    """004-60."""
    greedy = GenerationConfig(max_length=6, do_sample=False, temperature=1.9)
    one, two = (asyncio.run(tiny.submit_request_async("The lamps", greedy)).generated_ids for _ in range(2))
    assert (
        one
        == two
        == asyncio.run(
            tiny.submit_request_async("The lamps", SamplingParams(temperature=0.0, max_tokens=6))
        ).generated_ids
    )


# Statistics and memory.

STATISTICS = """
stats = engine.get_stats()
print(f"Status: {stats['engine_status']}")
print(f"Cache entries: {stats['cache_info']['num_entries']}")
metrics = stats['performance_metrics']
if 'batch_processing_time' in metrics:
    print(f"Avg batch time: {metrics['batch_processing_time']['mean']:.3f}s")
if 'tokens_per_second' in metrics:
    print(f"Throughput: {metrics['tokens_per_second']['mean']:.1f} tok/s")
"""


def test_the_statistics_have_the_keys_of_the_handbook(scripted: Make) -> None:
    """004-14, 004-31 to 004-37."""
    engine, _ = scripted(default_max_tokens=32)
    asyncio.run(engine.submit_request_async("a"))
    found = run(STATISTICS, engine=engine)
    assert found.printed[0] == "Status: running"
    assert found.printed[1] == "Cache entries: 2"  # 34 tokens less the last: two full blocks of 16
    assert [line.split(":")[0] for line in found.printed[2:]] == ["Avg batch time", "Throughput"]
    assert found.stats["cache_info"]["total_size"] >= 32
    assert 0 <= found.stats["memory_usage"] <= 1
    assert found.stats["device"] == "cpu"
    assert found.stats["config"]["max_batch_size"] == 32
    for name in ("batch_size", "first_token_latency", "batch_processing_time", "tokens_per_second"):
        keys = {"count", "mean", "min", "max", "latest", "p50", "p90", "p95", "p99"}
        assert keys <= found.metrics[name].keys()


def test_a_first_token_is_timed_before_the_last(scripted: Make) -> None:
    """B4-11: an earlier engine's first token latency was the time of the whole generation."""
    engine, model = scripted(hold_at=2, default_max_tokens=20)
    model.step_s = 0.002

    async def main() -> None:
        handle = engine.generate("a")
        await anext(handle)
        model.release()  # 19 steps follow, of 2 ms or more
        await handle

    asyncio.run(main())
    metrics = engine.get_stats()["performance_metrics"]
    assert metrics["end_to_end_latency"]["latest"] - metrics["first_token_latency"]["latest"] >= 0.038
    assert metrics["tokens_per_second"]["mean"] <= 500


MEMORY = """
from inference.engine import EngineConfig
config = EngineConfig(
    memory_pool_size=4 * 1024**3,
    kv_cache_max_size=2000,
    gc_threshold=0.85
)
if engine.get_stats()['memory_usage'] > 0.9:
    engine.optimize_memory()
"""


def test_memory_can_be_optimized_while_serving(tiny: InferenceEngine) -> None:
    """004-17, 004-36, 004-38, 004-109."""
    whole_block = "a" * tiny.config.block_size
    asyncio.run(tiny.submit_request_async(whole_block, GenerationConfig(max_length=2)))
    run(MEMORY, engine=tiny)
    assert tiny.get_stats()["cache_info"]["num_entries"] > 0
    found = tiny.optimize_memory()
    assert 0 < found["after"] <= 1
    assert 0 < found["before"] <= 1
    assert found["freed_bytes"] >= 0
    assert tiny.get_stats()["cache_info"]["num_entries"] == 0
    assert asyncio.run(tiny.submit_request_async("a", GenerationConfig(max_length=2))).finished
    assert tiny.get_stats()["cache_info"]["usage"] == 0.0


BATCH_SIZE = """
stats = engine.get_stats()
memory_usage = stats.get('memory_usage', 0)
if memory_usage < 0.7:
    config.max_batch_size *= 2
"""


def test_the_batch_size_can_be_doubled_while_requests_run(scripted: Make) -> None:
    """004-39: the change takes effect at the next step."""
    engine, model = scripted(max_batch_size=2, default_max_tokens=4)

    def serve_eight(change: Callable[[], object]) -> float:
        model.hold()
        ids = [engine.submit_request("a") for _ in range(8)]
        wait_until(lambda: engine.get_stats()["queue"]["num_requests"] == 8)
        change()
        model.release()
        for request_id in ids:
            result_of(engine, request_id)
        return float(engine.get_stats()["performance_metrics"]["batch_size"]["max"])

    assert serve_eight(lambda: None) == 2
    assert serve_eight(lambda: run(BATCH_SIZE, engine=engine, config=engine.config)) == 4
    assert engine.get_stats()["config"]["max_batch_size"] == 4


# Recipes.

RECIPES = """
from inference.engine import EngineConfig
production_config = EngineConfig(
    max_batch_size=32,
    max_sequence_length=2048,
    batch_timeout_ms=50.0,
    enable_dynamic_batching=True,
    enable_kv_cache=True,
    kv_cache_max_size=1000,
    memory_pool_size=2 * 1024 * 1024 * 1024,
    gc_threshold=0.8,
    enable_metrics=True,
    log_level="INFO"
)
latency_config = EngineConfig(
    max_batch_size=1,
    batch_timeout_ms=0,
    enable_speculative_decoding=True
)
throughput_config = EngineConfig(
    max_batch_size=64,
    batch_timeout_ms=100,
    enable_continuous_batching=True
)
memory_config = EngineConfig(
    memory_pool_size=4 * 1024**3,
    kv_cache_max_size=2000,
    gc_threshold=0.85
)
debug_config = EngineConfig(
    log_level="DEBUG",
    enable_metrics=True,
    profile_performance=True
)
"""

TROUBLESHOOTING = """
config.max_batch_size = 16
config.max_sequence_length = 1024
config.enable_gradient_checkpointing = True
config.memory_efficient_attention = True
config.max_batch_size = 32
config.batch_timeout_ms = 100
config.enable_continuous_batching = True
config.enable_dynamic_batching = True
config.batch_timeout_ms = 10
config.enable_speculative_decoding = True
config.speculation_length = 4
"""


@pytest.mark.parametrize("name", ["production", "latency", "throughput", "memory", "debug"])
def test_every_recipe_constructs_and_serves(name: str) -> None:
    """004-12, 004-43 to 004-52, 004-106 to 004-111: half of these settings were never built before."""
    config = getattr(run(RECIPES), f"{name}_config")
    run(TROUBLESHOOTING, config=config)
    assert (config.max_batch_size, config.max_sequence_length, config.batch_timeout_ms) == (32, 1024, 10)
    engine = InferenceEngine(ScriptedModel([5, 6], max_length=64), None, config, skip_tokenizer_init=True)
    assert asyncio.run(engine.submit_request_async([1, 2], GenerationConfig(max_length=3))).generated_ids == [5, 6, 5]
    engine.stop()


def test_the_defaults_are_those_of_the_table() -> None:
    """004-40 to 004-48, 004-54."""
    config = EngineConfig()
    assert (config.max_batch_size, config.max_sequence_length, config.batch_timeout_ms) == (32, 2048, 50.0)
    assert (config.enable_kv_cache, config.enable_dynamic_batching, config.enable_metrics) == (True, True, True)
    assert (config.memory_pool_size, config.gc_threshold, config.log_level) == (1024**3, 0.8, "INFO")
    assert (config.max_queue_size, config.priority_boost_threshold) == (1000, 5.0)


def test_decode_batch_size_and_prefill_chunk_size_limit_a_step(scripted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """004-54: both were never read. A step decodes what runs, so the first is another name of max_batch_size."""
    engine, model = scripted(decode_batch_size=2, prefill_chunk_size=16, default_max_tokens=4)
    assert (engine.config.max_batch_size, engine.config.max_num_batched_tokens) == (2, 16)
    plan_tokens: list[int] = []
    execute = model.execute
    monkeypatch.setattr(model, "execute", lambda plan: plan_tokens.append(plan.num_tokens) or execute(plan))
    model.hold()
    ids = [engine.submit_request("a prompt of more than sixteen bytes") for _ in range(4)]
    wait_until(lambda: engine.get_stats()["queue"]["num_requests"] == 4)
    model.release()
    assert [result_of(engine, request_id).text for request_id in ids] == ["okok"] * 4
    metrics = engine.get_stats()["performance_metrics"]
    assert metrics["batch_size"]["max"] == 2
    assert max(plan_tokens) == 16
    engine.config.decode_batch_size = 3
    assert engine.config.max_batch_size == 3


def test_settings_that_do_nothing_change_no_token(folder: str) -> None:
    """004-13, 004-50, 004-53: speculation, checkpointing and the rest never change the output."""
    plain, recipe = (
        InferenceEngine(folder, None, EngineConfig(**settings))
        for settings in (
            {},
            {"enable_speculative_decoding": True, "enable_gradient_checkpointing": True, "batch_timeout_ms": 0},
        )
    )
    greedy = GenerationConfig(max_length=8, do_sample=False)
    one, two = (asyncio.run(engine.submit_request_async("The turbine", greedy)) for engine in (plain, recipe))
    assert one.output_ids == two.output_ids
    for engine in (plain, recipe):
        engine.stop()


DEBUG = """
from inference.engine import EngineConfig
config = EngineConfig(
    log_level="DEBUG",
    enable_metrics=True,
    profile_performance=True
)
engine = InferenceEngine(model, tokenizer, config)
engine.start()
stats = engine.get_stats()
print(f"Detailed stats: {stats}")
"""


def test_debug_mode_logs_every_step(caplog: pytest.LogCaptureFixture) -> None:
    """004-49, 004-52, 004-110: events of this engine alone; the root logger keeps its level."""
    caplog.set_level(logging.DEBUG, logger="penstock")
    level = logging.getLogger().level
    model = ScriptedModel([5], max_length=64)
    found = run(DEBUG, model=model, tokenizer=TOKENIZER, InferenceEngine=InferenceEngine)
    asyncio.run(found.engine.submit_request_async("a", GenerationConfig(max_length=3)))
    found.engine.stop()
    steps = [record for record in caplog.records if record.getMessage().startswith("step (")]
    assert len(steps) == 3
    assert logging.getLogger().level == level
    assert torch.is_grad_enabled()


def test_debug_mode_prints_every_step_although_the_program_configures_no_logging(tmp_path: Path) -> None:
    """004-49, 004-52, 004-110: the recipe as a program of its own."""
    names = "from penstock import GenerationConfig, InferenceEngine, ScriptedModel"
    setup = f"{names}\nmodel, tokenizer = ScriptedModel([5]), None"
    end = "engine.submit_request([1], GenerationConfig(max_length=3))\nengine.stop()"
    recipe = DEBUG.replace("inference.engine", "penstock").replace(
        "=True\n)", "=True,\n    skip_tokenizer_init=True\n)"
    )
    path = tmp_path / "debug.py"
    path.write_text(f"{setup}\n{recipe}\n{end}")
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=100, check=True)
    assert ran.stdout.startswith("Detailed stats: {'engine_status': 'running'")
    lines = ran.stderr.splitlines()
    assert sum(" penstock: step (rows=1, tokens=1, seconds=" in line for line in lines) == 3
    assert sum("INFO penstock: Model weights loaded." in line for line in lines) == 1

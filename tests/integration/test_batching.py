"""Dynamic batching and tuning of the inference handbook: its snippets run as they are written there, and strategies,
limits and recommendations are those of a live engine.

Numbers like 004-71 in the docstrings are the rows of the requirements checklist, those like B4-9 bugs of an earlier
engine that must not come back. Comments and blank lines of the snippets are left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import (
    BatchingConfig,
    BatchingStrategy,
    DynamicBatcher,
    EngineConfig,
    InferenceEngine,
    MemoryEstimator,
    RequestHandle,
    RequestPriority,
    RequestTooLarge,
    SamplingParams,
    ScriptedModel,
)
from penstock.constraints.masks import Masks
from penstock.step import StepPlan, StepResult
from tests.scripted_engine import HoldingModel

PATIENCE_S = 30.0
ATTEMPTS = 10  # at what other programs on the machine may spoil


class Watched(HoldingModel):
    """Notes the first token of every row that samples, step by step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rows: list[list[int]] = []

    def execute(self, plan: StepPlan, masks: Masks | None = None) -> StepResult:
        self.rows.append([row.tokens[0] for row in plan.rows if row.samples])
        return super().execute(plan, masks)


Make = Callable[..., tuple[InferenceEngine, Watched]]


@pytest.fixture
def scripted() -> Iterator[Make]:
    """Makes engines over a `ScriptedModel`."""
    made: list[InferenceEngine] = []

    def make(
        step_s: float = 0.0, token_s: float = 0.0, hold_at: int = 0, **settings: Any
    ) -> tuple[InferenceEngine, Watched]:
        model = Watched([5, 6, 7], max_length=2048, step_s=step_s, token_s=token_s, hold_at=hold_at)
        made.append(InferenceEngine(model, None, EngineConfig(skip_tokenizer_init=True, log_level="ERROR", **settings)))
        return made[-1], model

    yield make
    for engine in made:
        engine.stop(0.0)


def run(source: str, **names: Any) -> SimpleNamespace:
    """Run a snippet as a script; its variables, and what it printed as `printed`."""
    printed: list[str] = []
    names |= {"__name__": "__main__", "print": lambda *words: printed.append(" ".join(map(str, words)))}
    exec(
        compile(source.replace("from inference.dynamic_batching import", "from penstock import"), "<s>", "exec"), names
    )
    return SimpleNamespace(**{name: value for name, value in names.items() if name.isidentifier()}, printed=printed)


def wait_until(condition: Callable[[], bool]) -> None:
    """Give the engine's threads time; fail if they never get there."""
    begin = monotonic()
    while not condition():
        assert monotonic() < begin + PATIENCE_S
        sleep(0.001)


async def served_at_once(engine: InferenceEngine, model: Watched, handles: list[RequestHandle]) -> None:
    """Let the model begin its first step once all requests are there, and wait for their ends."""
    await asyncio.to_thread(wait_until, lambda: engine.get_stats()["queue"]["num_requests"] == len(handles))
    model.release()
    await asyncio.gather(*handles)


def tokens(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False)


# Snippets.

BATCHER = """
from inference.dynamic_batching import DynamicBatcher, BatchingConfig, BatchingStrategy
config = BatchingConfig(
    strategy=BatchingStrategy.MEMORY_AWARE,
    max_batch_size=32,
    memory_limit_mb=4096
)
batcher = DynamicBatcher(config, memory_estimator)
batcher.add_items([(request, seq_len) for request, seq_len in requests])
batch, batch_info = batcher.get_next_batch()
"""

ESTIMATOR = """
from inference.dynamic_batching import MemoryEstimator, BatchingConfig, BatchingStrategy, DynamicBatcher
estimator = MemoryEstimator(
    model_hidden_size=4096,
    num_layers=32,
    num_heads=32
)
config = BatchingConfig(
    strategy=BatchingStrategy.MEMORY_AWARE,
    memory_limit_mb=8192,
    max_total_tokens=65536
)
batcher = DynamicBatcher(config, estimator)
"""

RECOMMENDATIONS = """
from inference.dynamic_batching import BatchingOptimizer
optimizer = BatchingOptimizer()
recommendations = optimizer.get_recommendations()
print(f"Best strategy: {recommendations['best_strategy']}")
print(f"Suggestions: {recommendations['suggestions']}")
"""


def test_the_batcher_of_the_handbook_forms_a_batch() -> None:
    """004-68 to 004-71, 004-76, 004-78, 004-81."""
    requests = [(f"request {i}", 50 + 10 * i) for i in range(5)]
    found = run(BATCHER, memory_estimator=MemoryEstimator(768, 12, 12), requests=requests)
    assert sorted(found.batch) == [request for request, _ in requests]
    assert {"strategy", "batch_size", "max_length", "lengths"} <= found.batch_info.keys()
    assert {"estimated_memory_mb", "memory_utilization"} <= found.batch_info.keys()
    assert found.batch_info["strategy"] == "memory_aware"


def test_the_estimator_of_the_handbook_fits_what_its_limit_holds() -> None:
    """004-80, 004-83: 8 GiB hold 7 sequences of 2,048 tokens of a 7B model, with what a step needs beside."""
    found = run(ESTIMATOR)
    found.batcher.add_items([(i, 2048) for i in range(10)])
    batch, info = found.batcher.get_next_batch()
    assert len(batch) == 7
    assert 0.85 < info["memory_utilization"] <= 1.0
    assert found.estimator.find_optimal_batch_size([2048] * 10, 8192 * 2**20, 32) == 7


def test_recommendations_of_the_handbook_are_always_there() -> None:
    """004-85: a KeyError before."""
    found = run(RECOMMENDATIONS)
    assert found.printed[0] == "Best strategy: continuous"
    assert found.printed[1].startswith("Suggestions: ['Record more batches")


def test_every_strategy_of_the_handbook_has_its_name() -> None:
    """004-72 to 004-75."""
    assert [strategy.name for strategy in BatchingStrategy] == ["NAIVE", "BUCKETED", "MEMORY_AWARE", "CONTINUOUS"]
    for strategy in BatchingStrategy:
        batcher = DynamicBatcher(BatchingConfig(strategy=strategy, max_batch_size=4))
        batcher.add_items([("item1", 100), ("item2", 150), ("item3", 200), ("item4", 120)])
        batch, info = batcher.get_next_batch()
        assert info["strategy"] == strategy
        assert len(batch) == 4 or strategy is BatchingStrategy.BUCKETED


# The strategies of a live engine.


async def test_lengths_that_are_alike_start_together(scripted: Make) -> None:
    settings = {"bucket_size": 4, "max_batch_size": 2, "enable_kv_cache": False, "hold_at": 1}
    engine, model = scripted(batching_strategy="bucketed", **settings)
    first = engine.generate([1], tokens(1))
    await asyncio.to_thread(wait_until, model.is_held.is_set)
    handles = [engine.generate([number] * length, tokens(1)) for number, length in ((2, 8), (3, 60), (4, 9), (5, 61))]
    await asyncio.to_thread(wait_until, lambda: engine.get_stats()["queue"]["num_waiting"] == len(handles))
    model.release()
    await asyncio.gather(first, *handles)
    assert model.rows == [[1], [2, 4], [3, 5]]


async def test_a_static_batch_is_joined_by_nobody(scripted: Make) -> None:
    engine, model = scripted(batching_strategy="naive", max_batch_size=2, hold_at=2)
    slow = engine.generate([1] * 4, tokens(30))
    await asyncio.wait_for(anext(slow), PATIENCE_S)
    late = engine.generate([2] * 4, tokens(1), priority=RequestPriority.CRITICAL)
    await asyncio.to_thread(wait_until, lambda: engine.get_stats()["queue"]["num_waiting"] == 1)
    model.release()
    await asyncio.gather(slow, late)
    assert model.rows == [[1]] * 30 + [[2]]


async def test_memory_aware_never_preempts_where_continuous_does(scripted: Make) -> None:
    async def preemptions(strategy: str) -> int:
        settings = {"kv_cache_tokens": 512, "enable_kv_cache": False, "hold_at": 1}
        engine, model = scripted(batching_strategy=strategy, **settings)
        await served_at_once(engine, model, [engine.generate([i] * 32, tokens(128)) for i in range(1, 9)])
        return int(engine.get_stats()["queue"]["num_preemptions"])

    assert await preemptions("continuous") > 0
    assert await preemptions("memory_aware") == 0


async def test_what_no_memory_limit_allows_is_refused(scripted: Make) -> None:
    """B4-13. A token of a scripted model's cache is a byte."""
    engine, _ = scripted(batching_strategy="memory_aware", memory_limit_mb=0.001)
    with pytest.raises(RequestTooLarge, match="memory_limit_mb"):
        await engine.generate([1] * 1000, tokens(100))
    assert (await engine.generate([1] * 900, tokens(10))).finished


async def test_the_batch_forms_while_a_burst_arrives_and_nobody_waits_for_its_end(scripted: Make) -> None:
    """B4-9: batch_timeout_ms formed no batches, and newcomers waited for the whole static batch."""
    first_batch: list[int] = []
    for _ in range(ATTEMPTS):  # a burst whose sender has to wait for its turn is not one
        engine, model = scripted(batch_timeout_ms=100, step_s=0.005)
        engine.start()
        long = [engine.generate([i], tokens(2000)) for i in range(1, 5)]
        for handle in long:
            await asyncio.wait_for(anext(handle), PATIENCE_S)
        assert (await engine.generate([9], tokens(1))).finished
        assert not any(handle.status.name == "COMPLETED" for handle in long)
        first_batch = model.rows[0]
        if first_batch == [1, 2, 3, 4]:
            return
    pytest.fail(f"the first batch was {first_batch}")


# Limits and advice of a live engine.


async def test_a_batch_limit_assigned_while_serving_is_in_force_at_the_next_step(scripted: Make) -> None:
    """004-39, 004-111."""
    engine, model = scripted(max_batch_size=1, hold_at=2)
    handles = [engine.generate([i], tokens(5)) for i in range(1, 5)]
    await asyncio.wait_for(anext(handles[0]), PATIENCE_S)
    await asyncio.to_thread(wait_until, lambda: engine.get_stats()["queue"]["num_waiting"] == 3)
    engine.config.max_batch_size = 4
    model.release()
    await asyncio.gather(*handles)
    assert model.rows[:3] == [[1], [1], [1, 2, 3, 4]]
    assert engine.get_stats()["performance_metrics"]["batch_size"]["max"] == 4


async def test_every_step_is_recorded_and_the_engine_advises(scripted: Make) -> None:
    """004-86: nothing called record_batch. 40 requests behind a batch of 2 call for a larger one."""
    engine, model = scripted(max_batch_size=2, hold_at=1)
    assert engine.batching_optimizer.get_recommendations()["samples"] == 0
    await served_at_once(engine, model, [engine.generate([i], tokens(4)) for i in range(1, 41)])
    found = engine.batching_optimizer.get_recommendations()
    assert found["best_strategy"] == "continuous"
    assert found["samples"] == engine.get_stats()["totals"]["steps"]
    assert "no other strategy was measured" in found["basis"]
    assert any("max_batch_size above 2" in text for text in found["suggestions"])


async def test_without_metrics_nothing_is_recorded(scripted: Make) -> None:
    engine, _ = scripted(enable_metrics=False)
    await engine.generate([1], tokens(4))
    assert engine.batching_optimizer.get_recommendations()["samples"] == 0


async def test_the_tuner_is_visible_and_touches_no_sampling(scripted: Make) -> None:
    """004-103, B4-16: what adapted to latency was the user's temperature."""
    engine, _ = scripted(target="latency", max_inter_token_ms=50, step_s=0.002, token_s=0.0002)
    assert engine.get_stats()["tuner"] == {}
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=60, seed=1, detokenize=False)
    outputs = await asyncio.gather(*(engine.generate([i] * 40, params) for i in range(1, 9)))
    assert {len(output.outputs[0].token_ids) for output in outputs} == {60}
    assert (params.temperature, params.top_p) == (0.7, 0.9)
    tuner = engine.get_stats()["tuner"]
    assert tuner["target"] == "latency"
    assert set(tuner["limits"]) == {
        *("chunk_tokens", "alone_tokens", "max_batch_size", "draft_length", "batch_timeout_ms")
    }
    assert tuner["steps"] > 20
    assert tuner["changes"]
    assert engine.get_stats()["config"]["max_batch_size"] == 32


async def test_the_tuner_says_every_change_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="penstock"):
        config = EngineConfig(skip_tokenizer_init=True, target="throughput")
        async with InferenceEngine(ScriptedModel([5], step_s=0.001), None, config) as engine:
            await asyncio.gather(*(engine.generate([i], tokens(40)) for i in range(1, 65)))
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("tuned ")]
    assert lines
    assert all("before=" in line and "after=" in line and "reason=" in line for line in lines)


@pytest.mark.parametrize(("target", "rows"), [(None, 32), ("latency", 32), ("throughput", 256)])
async def test_the_cache_has_room_for_as_many_as_may_run(target: str | None, rows: int) -> None:
    """Toward throughput 256 sequences may run where nobody gave another number; the cache was sized for 32."""
    config = EngineConfig(skip_tokenizer_init=True, target=target, max_sequence_length=64, block_size=16)
    async with InferenceEngine(ScriptedModel([5]), None, config) as engine:
        await engine.generate([1], tokens(2))
        assert engine.get_stats()["cache_info"]["num_blocks"] == rows * 4 + 1

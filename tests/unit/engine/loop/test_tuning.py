"""The tuner with a scheduler, limits, and a clock that only steps advance; the test knows the cost of steps."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.engine.loop.tuning import Tuning
from penstock.sampling import SamplingParams
from penstock.scheduling.limits import Limits
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence
from penstock.step import RowResult, StepPlan, StepRecord, StepResult, record_of


class Log:
    """Keeps log events."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})


class Plant:
    """A small engine whose steps take as long as those of a 0.6B model on two cores, with their noise."""

    def __init__(
        self,
        *,
        seed: int = 0,
        noise: float = 0.03,
        stalls: float = 0.005,
        slow_s: tuple[float, float] = (0, 0),
        **settings: Any,
    ) -> None:
        self.config = EngineConfig(**settings)
        self.cache = CacheManager(20_000, 16, enable_prefix_caching=False)
        self.limits = Limits(self.config)
        self.log = Log()
        self.tuning = Tuning(self.config, self.limits, self.log)
        self.scheduler = Scheduler(self.config, self.cache, limits=self.limits)
        self.rng, self.noise, self.stalls, self.slow_s = random.Random(seed), noise, stalls, slow_s
        self.now = 0.0
        self.count = 0
        self.waits: list[float] = []  # of streams, for every token but the first
        self.generated = 0

    def add(self, prompt: int, new: int) -> None:
        self.count += 1
        params = SamplingParams(max_tokens=new)
        seq = Sequence(
            id=self.count, request_id="", params=params, tokens=[0] * prompt, max_len=prompt + new, arrival=self.now
        )
        self.scheduler.add(seq, self.now)

    def step(self) -> StepRecord:
        plan = self.scheduler.plan(self.now)
        assert plan.rows
        result = StepResult(tuple(RowResult((7,) if row.samples else ()) for row in plan.rows))
        seconds = self.cost_s(plan)
        self.now += seconds
        events = self.scheduler.commit(plan, result)
        record = record_of(plan, result, events, seconds, self.scheduler.num_waiting)
        self.tuning.observe(record)
        self.waits += [seconds] * record.streams
        self.generated += record.generated
        return record

    def cost_s(self, plan: StepPlan) -> float:
        record = record_of(plan, StepResult((RowResult(),) * len(plan.rows)), (), 0.0, 0)
        token_ms = 0.4 + 0.004 * min(record.prompt_tokens, 40) + 0.00035 * record.depth
        ms = 25 + 1.6 * record.streams + record.prompt_tokens * token_ms + 0.0055 * record.depth
        stall_ms = 12 if self.rng.random() < self.stalls else 0
        slower = 1.3 if self.slow_s[0] < self.now < self.slow_s[1] else 1.0
        return slower * (ms * (1 + abs(self.rng.gauss(0, self.noise))) + stall_ms) / 1000

    def p99(self) -> float:
        ordered = sorted(self.waits)
        return ordered[int(0.99 * len(ordered))]


def keep_arriving(plant: Plant, seconds: float = 60.0) -> Plant:
    """2 continuing streams and, every 10 seconds, a prompt of 2,000 tokens."""
    for _ in range(2):
        plant.add(100, 3000)
    due = 2.0
    while plant.now < seconds:
        if plant.now >= due:
            plant.add(2000, 8)
            due += 10.0
        plant.step()
    return plant


@pytest.mark.parametrize("seed", range(4))
def test_latency_keeps_its_bound_while_long_prompts_arrive(seed: int) -> None:
    plant = keep_arriving(Plant(target="latency", max_inter_token_ms=60, seed=seed))
    assert plant.p99() < 0.060
    assert plant.scheduler.num_waiting == 0, "and every prompt is served before the next but one comes"
    assert len(plant.log.lines) < 30


@pytest.mark.parametrize("trouble", [{"noise": 0.06}, {"stalls": 0.03}, {"slow_s": (20.0, 35.0)}], ids=str)
def test_latency_keeps_its_bound_on_a_machine_that_others_use(trouble: dict[str, Any]) -> None:
    assert keep_arriving(Plant(target="latency", max_inter_token_ms=60, **trouble)).p99() < 0.060


def test_the_same_engine_untuned_does_not() -> None:
    assert keep_arriving(Plant(), seconds=20.0).p99() > 0.2


def test_prompts_are_not_served_slower_than_the_bound_demands() -> None:
    plant = keep_arriving(Plant(target="latency", max_inter_token_ms=60))
    mixed = sorted(wait for wait in plant.waits if wait > 0.040)
    assert mixed[len(mixed) // 2] > 0.75 * 0.060


def test_streams_beyond_the_bound_wait() -> None:
    plant = Plant(target="latency", max_inter_token_ms=60)
    for _ in range(40):
        plant.add(30, 400)
    while plant.now < 40.0:
        plant.step()
    assert plant.p99() < 0.060
    assert 10 <= plant.limits.resolve().max_running <= 20
    assert plant.scheduler.num_waiting > 0


def test_throughput_finds_the_batch_that_was_not_given() -> None:
    def tokens_per_second(**settings: Any) -> float:
        plant = Plant(**settings)
        for _ in range(128):
            plant.add(64, 64)
        while plant.scheduler.has_work:
            plant.step()
        return plant.generated / plant.now

    by_hand = [tokens_per_second(max_batch_size=rows, max_num_batched_tokens=512) for rows in (8, 32, 64, 128)]
    assert tokens_per_second(target="throughput") > 0.95 * max(by_hand)
    assert tokens_per_second(target="throughput", max_batch_size=8) < 0.6 * max(by_hand), "what was given is kept to"


class Light(Plant):
    """An engine where the fixed cost of a step exceeds that of its tokens."""

    def cost_s(self, plan: StepPlan) -> float:
        record = record_of(plan, StepResult((RowResult(),) * len(plan.rows)), (), 0.0, 0)
        return (10 + 0.1 * record.streams + 0.02 * record.prompt_tokens) / 1000


def test_throughput_finds_chunk_and_batch_while_long_prompts_keep_coming() -> None:
    """No step had streams alone, and none the chunk's own size: neither limit ever changed."""

    def tokens_per_second(**settings: Any) -> float:
        plant = Light(**settings)
        while plant.count < 400 or plant.scheduler.has_work:
            while plant.count < 400 and plant.scheduler.num_waiting + plant.scheduler.num_running < 80:
                plant.add(2000, 64)
            plant.step()
        return plant.generated / plant.now

    by_hand = tokens_per_second(max_batch_size=80, max_num_batched_tokens=4096)
    assert tokens_per_second(max_batch_size=32, max_num_batched_tokens=512) < 0.7 * by_hand
    assert tokens_per_second(target="throughput") > 0.95 * by_hand


def test_everything_follows_from_the_records() -> None:
    first, second = (keep_arriving(Plant(target="latency"), seconds=10.0) for _ in range(2))
    assert first.log.lines == second.log.lines
    assert first.tuning.stats() == second.tuning.stats()


def test_every_change_is_logged_once_with_its_reason() -> None:
    plant = keep_arriving(Plant(target="latency"), seconds=10.0)
    assert plant.log.lines
    assert {line["event"] for line in plant.log.lines} == {"tuned"}
    assert all(line["before"] != line["after"] and "streams take" in line["reason"] for line in plant.log.lines)
    stats = plant.tuning.stats()
    assert stats["target"] == "latency"
    assert stats["limits"]["chunk_tokens"] >= plant.limits.resolve().token_budget(4, 0) - 4
    told = [{key: value for key, value in change.items() if key != "step"} for change in stats["changes"]]
    assert told == [{key: value for key, value in line.items() if key != "event"} for line in plant.log.lines][-32:]


def test_without_a_target_nothing_is_tuned_and_nothing_logged() -> None:
    plant = keep_arriving(Plant(), seconds=5.0)
    assert (plant.limits.tuned, plant.tuning.stats(), plant.log.lines) == (None, {}, [])


def test_the_target_may_change_while_it_runs() -> None:
    plant = keep_arriving(Plant(), seconds=5.0)
    plant.config.target = "latency"
    plant.step()
    assert plant.limits.resolve().token_budget(4, 0) == 12
    plant.config.target = None
    plant.step()
    assert (plant.limits.tuned, plant.limits.resolve().token_budget(4, 0)) == (None, 512)

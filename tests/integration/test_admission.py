"""A full queue: who gives way to whom, what each is told, and whether the named wait is what it takes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest

from penstock import (
    EngineOverloaded,
    InferenceEngine,
    RequestError,
    RequestHandle,
    RequestPriority,
    RequestStatus,
    SamplingParams,
    ScriptedModel,
)
from tests.scripted_engine import HoldingModel

PATIENCE_S = 30.0
ATTEMPTS = 10  # at what other programs on the machine may spoil
LOW, NORMAL, HIGH, CRITICAL = RequestPriority
Make = Callable[..., tuple[InferenceEngine, HoldingModel]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[InferenceEngine] = []

    def build(step_s: float = 0.0, hold_at: int = 0, **settings: Any) -> tuple[InferenceEngine, HoldingModel]:
        model = HoldingModel([5, 6, 7], max_length=4096, step_s=step_s, hold_at=hold_at)
        made.append(InferenceEngine(model, None, **{"max_batch_size": 1, "batch_timeout_ms": 0, **settings}))
        return made[-1], model

    yield build
    for engine in made:
        engine.stop(0.0)


def running(engine: InferenceEngine, model: ScriptedModel, count: int = 50) -> RequestHandle:
    """A request whose first step is held, so that whatever follows waits."""
    model.hold()
    handle = engine.generate([1], SamplingParams(max_tokens=count))
    wait_until(lambda: handle.status is RequestStatus.PROCESSING)
    return handle


def wait_until(condition: Callable[[], bool]) -> None:
    deadline, pulse = monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        assert monotonic() < deadline, "the condition did not come true in time"
        pulse.wait(0.001)


def outcome(handle: RequestHandle) -> str:
    """How a request ended."""
    try:
        return f"{len(handle.result(PATIENCE_S).generated_ids)} tokens"
    except EngineOverloaded as error:
        is_told = error.retry_after_s > 0 and "a request of a higher class took the place of this one" in str(error)
        return "displaced" if is_told else str(error)


def test_a_critical_request_takes_the_place_of_the_newest_low_one(make: Make) -> None:
    """With the queue full of LOW, CRITICAL was refused."""
    engine, model = make(max_queue_size=3)
    first = running(engine, model)
    low = [engine.generate([1], SamplingParams(max_tokens=2), priority=LOW) for _ in range(3)]
    critical = engine.generate([1], SamplingParams(max_tokens=3), priority=CRITICAL)
    assert engine.get_stats()["queue"]["num_queued_requests"] == 3
    with pytest.raises(EngineOverloaded):
        engine.generate([1], priority=LOW)
    model.release()
    assert [outcome(handle) for handle in [first, *low, critical]] == [
        *("50 tokens", "2 tokens", "2 tokens", "displaced", "3 tokens")
    ]
    assert low[2].status is RequestStatus.FAILED
    queue = engine.get_stats()["queue"]
    assert (queue["num_queued_requests"], queue["num_queued_tokens"]) == (0, 0)


def test_prompt_tokens_give_way_too(make: Make) -> None:
    engine, model = make(max_queued_tokens=100)
    first = running(engine, model, 2)
    low = [engine.generate([1] * 40, SamplingParams(max_tokens=2), priority=LOW) for _ in range(2)]
    high = engine.generate([1] * 50, SamplingParams(max_tokens=1, n=2), priority=HIGH)
    assert engine.get_stats()["queue"]["num_queued_tokens"] == 90
    model.release()
    assert [outcome(handle) for handle in [first, *low, high]] == ["2 tokens", "2 tokens", "displaced", "1 tokens"]


def test_what_has_started_is_not_displaced(make: Make) -> None:
    engine, model = make(max_queue_size=1, max_batch_size=2)
    model.hold()
    started = [engine.generate([1], SamplingParams(max_tokens=4), priority=LOW)]
    wait_until(lambda: started[0].status is RequestStatus.PROCESSING)
    engine.generate([1], SamplingParams(max_tokens=4), priority=CRITICAL).detach()
    with pytest.raises(EngineOverloaded):
        engine.generate([1], priority=CRITICAL)
    model.release()
    assert outcome(started[0]) == "4 tokens"


def test_forks_come_together_and_displace_together(make: Make) -> None:
    """fork(n) that was refused in the middle left forks behind that ran without a handle."""
    engine, model = make(max_queue_size=3, hold_at=6)
    origin = engine.generate([1], SamplingParams(max_tokens=2000), priority=HIGH)
    wait_until(model.is_held.is_set)
    others = [engine.generate([1], SamplingParams(max_tokens=1), priority=rank) for rank in (HIGH, LOW, LOW)]
    with pytest.raises(EngineOverloaded):
        origin.fork(3)
    assert engine.get_stats()["queue"]["num_queued_requests"] == 3
    assert not any(handle.done() for handle in others)
    forks = origin.fork(2, SamplingParams(max_tokens=2))
    assert [outcome(handle) for handle in others[1:]] == ["displaced", "displaced"]
    origin.cancel()
    model.release()
    assert [outcome(handle) for handle in forks] == ["2 tokens", "2 tokens"]
    assert outcome(others[0]) == "1 tokens"
    assert engine.get_stats()["queue"]["num_requests"] == 0


def test_more_forks_than_may_wait_are_refused_as_a_whole(make: Make) -> None:
    engine, model = make(max_queue_size=2, hold_at=6)
    origin = engine.generate([1], SamplingParams(max_tokens=2000))
    wait_until(model.is_held.is_set)
    with pytest.raises(EngineOverloaded, match="4 forks, and at most"):
        origin.fork(4)
    assert engine.get_stats()["queue"]["num_requests"] == 1
    origin.cancel()
    model.release()


def test_many_threads_and_classes_lose_nobody_and_never_overfill_the_queue(make: Make) -> None:
    engine, model = make(max_queue_size=8, max_queued_tokens=120, max_batch_size=4)
    engine.start()
    model.hold()  # until the queue was full, however fast the engine is
    tally: list[tuple[RequestPriority, str]] = []
    kept: list[RequestHandle] = []
    most = [0]

    def client(seed: int) -> None:
        draw, handles = random.Random(seed), []
        for _ in range(60):
            rank = draw.choice([LOW, NORMAL, HIGH, CRITICAL])
            prompt = [1] * draw.randint(1, 30)
            try:
                handle = engine.generate(prompt, SamplingParams(max_tokens=2), priority=rank)
            except EngineOverloaded:
                tally.append((rank, "refused"))
            else:
                if draw.random() < 0.1:
                    handle.cancel()
                else:
                    handles.append((rank, handle))
                    kept.append(handle)
            most[0] = max(most[0], engine.get_stats()["queue"]["num_queued_requests"])
        tally.extend((rank, outcome(handle)) for rank, handle in handles)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: bool(tally) and any(handle.status is RequestStatus.FAILED for handle in kept))
    model.release()
    for thread in threads:
        thread.join(PATIENCE_S)
    wait_until(lambda: engine.get_stats()["queue"]["num_requests"] == 0)  # the last one may have been cancelled
    queue = engine.get_stats()["queue"]
    assert (queue["num_requests"], queue["num_queued_requests"], queue["num_queued_tokens"]) == (0, 0, 0)
    assert {told for _, told in tally} == {"refused", "displaced", "2 tokens"}
    assert (CRITICAL, "displaced") not in tally
    totals, refusals = engine.get_stats()["totals"], engine.get_stats()["refusals"]
    assert refusals == {"EngineOverloaded": [told for _, told in tally].count("refused")}
    assert totals["displaced_requests"] >= [told for _, told in tally].count("displaced")
    assert totals["requests"] + totals["displaced_requests"] + refusals["EngineOverloaded"] == 6 * 60
    assert queue["num_finished_error"] == 0
    assert most[0] <= 8


def test_refusals_and_displaced_requests_have_counts_of_their_own(make: Make) -> None:
    """Displaced requests were counted as failed ones, and refusals as requests, or not at all."""
    engine, model = make(max_queue_size=2, max_batch_size=1, max_sequence_length=100)
    first = running(engine, model, 2)
    waiting = [engine.generate([1], SamplingParams(max_tokens=2, n=2)) for _ in range(2)]
    wait_until(lambda: engine.get_stats()["queue"]["num_waiting"] >= 2)
    with pytest.raises(EngineOverloaded):
        engine.generate([1])
    urgent = engine.generate([1], SamplingParams(max_tokens=2), priority=CRITICAL)
    with pytest.raises(EngineOverloaded):
        waiting[1].result(PATIENCE_S)
    model.release()
    assert len(waiting[0].result(PATIENCE_S).outputs) == 2
    assert len(first.result(PATIENCE_S).generated_ids) == len(urgent.result(PATIENCE_S).generated_ids) == 2
    for prompt in ([1] * 200, [1] * 99, [1 << 20]):  # two are too long, and the last has no such token
        with pytest.raises(RequestError):
            engine.generate(prompt, SamplingParams(max_tokens=2)).result(PATIENCE_S)
    stats = engine.get_stats()
    assert stats["refusals"] == {"EngineOverloaded": 1, "RequestTooLarge": 2, "RequestError": 1}
    assert (stats["totals"]["requests"], stats["totals"]["displaced_requests"]) == (3, 1)
    queue = stats["queue"]
    assert (queue["num_finished_length"], queue["num_displaced"], queue["num_finished_error"]) == (4, 2, 0)


@pytest.mark.parametrize("tokens", [False, True], ids=["requests", "prompt tokens"])
def test_the_named_wait_is_about_what_it_takes(make: Make, tokens: bool) -> None:
    """Right after the start it was 0.05 s, whatever the model's speed."""
    limit = {"max_queued_tokens": 30} if tokens else {"max_queue_size": 3}
    engine, _ = make(step_s=0.005, max_batch_size=2, **limit)
    handles = [engine.generate([1] * 10, SamplingParams(max_tokens=60)).detach() for _ in range(2)]
    wait_until(lambda: not any(handle.status is RequestStatus.QUEUED for handle in handles))
    handles += [engine.generate([1] * 10, SamplingParams(max_tokens=60)).detach() for _ in range(3)]
    wait_until(lambda: engine.get_stats()["totals"]["generated_tokens"] > 4)
    measured: list[tuple[float, float]] = []
    while sum(really / 2 <= told <= 2 * really + 0.02 for told, really in measured) < 2:
        assert len(measured) < ATTEMPTS, measured
        measured.append(told_and_really(engine))


def told_and_really(engine: InferenceEngine) -> tuple[float, float]:
    """What the first request that is refused is told to wait, and how long it is until one is let in."""
    told, begin, pulse = 0.0, 0.0, threading.Event()
    while True:
        try:
            engine.generate([1] * 10, SamplingParams(max_tokens=60)).detach()
        except EngineOverloaded as error:
            told, begin = told or error.retry_after_s, begin or monotonic()
            pulse.wait(0.002)
        else:
            if told:
                return told, monotonic() - begin

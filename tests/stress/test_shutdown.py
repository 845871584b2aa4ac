"""Stopping: everybody who waits is told, nobody waits for ever, whoever it is that stops."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import pytest

from penstock.engine.handle import RequestHandle
from penstock.engine.inference import InferenceEngine
from penstock.errors import EngineClosed, RequestAborted
from penstock.models.scripted import ScriptedModel
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import SamplingParams
from penstock.step import StepPlan, StepResult

ENDLESS = SamplingParams(max_tokens=1500)
PROMPTLY_S = 2.0  # on a busy machine; all the ways to wait for ever take much longer


def slow_engine(**settings: Any) -> InferenceEngine:
    """Endless requests take 3 s each."""
    return InferenceEngine(
        ScriptedModel([5, 6, 7], step_s=0.002, max_length=4096), **{"batch_timeout_ms": 0, **settings}
    )


def begun(engine: InferenceEngine) -> RequestHandle:
    """An endless request that is running."""
    handle = engine.generate([1], ENDLESS)
    while handle.status.value == "queued":
        time.sleep(0.001)
    return handle


def test_draining_finishes_what_was_accepted() -> None:
    engine = slow_engine(max_batch_size=2)
    handles = [engine.generate([1], SamplingParams(max_tokens=10)) for _ in range(20)]
    engine.stop(drain=30)
    assert all(handle.result(0).generated_ids == [5, 6, 7, 5, 6, 7, 5, 6, 7, 5] for handle in handles)


def test_stop_without_draining_ends_every_waiter_promptly() -> None:
    engine = slow_engine(max_batch_size=2)
    handles = [begun(engine), *(engine.generate([1], ENDLESS) for _ in range(20))]
    begin = time.monotonic()
    engine.stop(0)
    for handle in handles:
        with pytest.raises((RequestAborted, EngineClosed)):
            handle.result(0)
    assert time.monotonic() - begin < PROMPTLY_S


def test_drain_that_takes_too_long_is_cut_off() -> None:
    engine = slow_engine()
    handle = begun(engine)
    engine.stop(drain=0.1)
    with pytest.raises(RequestAborted) as caught:
        handle.result(0)
    assert isinstance(caught.value.output, RequestOutput)
    assert caught.value.output.generated_ids


def test_waiters_in_other_loops_are_told() -> None:
    engine = slow_engine()
    endings: list[BaseException] = []

    async def wait() -> None:
        try:
            await engine.generate([1], ENDLESS)
        except RequestAborted as error:
            endings.append(error)

    threads = [threading.Thread(target=asyncio.run, args=(wait(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    while engine.get_stats()["queue"]["num_running"] < 3:
        time.sleep(0.001)
    engine.stop(0)
    for thread in threads:
        thread.join(10)
    assert len(endings) == 3


def test_stop_twice_and_from_two_threads_at_once() -> None:
    engine = slow_engine()
    handle = begun(engine)
    threads = [threading.Thread(target=engine.stop, args=(0.1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    engine.stop()
    assert handle.done()


def test_everything_after_stop_raises_engine_closed() -> None:
    engine = slow_engine()
    engine.start()
    engine.stop()
    with pytest.raises(EngineClosed):
        engine.generate([1])
    with pytest.raises(EngineClosed):
        engine.submit_request([1])
    with pytest.raises(EngineClosed):
        engine.start()
    assert engine.get_stats()["engine_status"] == "stopped"
    assert engine.get_stats()["queue"]["num_queued_requests"] == 0


def test_engine_that_was_stopped_before_it_started_says_so() -> None:
    """`generate` waited for a thread that never ran, and `start` for a model that nobody loaded."""
    engine = slow_engine()
    engine.stop()
    with pytest.raises(EngineClosed):
        engine.generate([1])
    with pytest.raises(EngineClosed):
        engine.start()


def test_new_requests_are_refused_while_the_engine_drains() -> None:
    """They were accepted, so that an engine under load never came to its end."""
    engine = slow_engine()
    handle = begun(engine)
    stopping = threading.Thread(target=engine.stop, args=(0.5,))
    stopping.start()
    refusals = 0
    while stopping.is_alive():
        try:
            engine.generate([1], ENDLESS).detach()
        except EngineClosed:
            refusals += 1
        time.sleep(0.001)
    assert refusals > 0
    assert handle.done()


async def test_stop_in_a_coroutine_that_uses_the_engine_does_not_deadlock() -> None:
    engine = slow_engine()
    handle = engine.generate([1], SamplingParams(max_tokens=20))
    await anext(handle)
    engine.stop()  # blocks this loop, which the engine does not need
    assert len((await handle).generated_ids) == 20


async def test_aclose_leaves_the_loop_free() -> None:
    engine = slow_engine()
    handle = engine.generate([1], SamplingParams(max_tokens=50))
    waiting = asyncio.ensure_future(handle)
    await asyncio.sleep(0)
    await engine.aclose()
    assert len((await waiting).generated_ids) == 50


@pytest.mark.parametrize("drain_s", [0.0, 10.0])
def test_stop_in_a_callback_on_the_engines_callback_thread(drain_s: float) -> None:
    engine = slow_engine()
    stopped = threading.Event()

    def stop(delta: Delta) -> None:
        if not stopped.is_set():
            engine.stop(drain_s)
            stopped.set()

    engine.generate([1], SamplingParams(max_tokens=30), callback=stop)
    assert stopped.wait(10)


async def test_stop_in_a_callback_on_the_users_loop() -> None:
    engine = slow_engine()
    deltas: list[Delta] = []
    finished = asyncio.Event()

    def stop(delta: Delta) -> None:
        deltas.append(delta)
        engine.stop(10)
        if delta.finished:
            finished.set()

    handle = engine.generate([1], SamplingParams(max_tokens=30), callback=stop)
    assert len((await handle).generated_ids) == 30
    await finished.wait()
    assert sum(len(delta.token_ids) for delta in deltas) == 30


class StoppingModel(ScriptedModel):
    """A model whose step runs a function of the test's, on the model's own thread."""

    during_step: Any = None

    def execute(self, plan: StepPlan) -> StepResult:
        if self.during_step is not None:
            self.during_step()
        return super().execute(plan)


def test_stop_on_the_models_thread_does_not_deadlock() -> None:
    """It joined the engine's thread, which waited for the model's."""
    model = StoppingModel([5], max_length=4096)
    engine = InferenceEngine(model, batch_timeout_ms=0)
    model.during_step = lambda: engine.stop(0)
    handle = engine.generate([1], ENDLESS)
    with pytest.raises((RequestAborted, EngineClosed)):
        handle.result(10)


def test_engine_collected_as_garbage_on_the_models_thread_ends() -> None:
    """The garbage collector runs where it likes. On the model's thread the finalizer waited for itself."""
    model = StoppingModel([5], max_length=4096)
    engine = InferenceEngine(model, batch_timeout_ms=0)
    handle = begun(engine)
    cycle: list[Any] = [engine]
    cycle.append(cycle)
    collected = threading.Event()
    weakref.finalize(engine, collected.set)
    gc.disable()
    try:
        handle.detach()
        del engine, handle, cycle
        model.during_step = gc.collect
        assert collected.wait(10)
    finally:
        model.during_step = None
        gc.enable()
    for thread in threading.enumerate():
        if thread.name == "penstock-engine":
            thread.join(10)
            assert not thread.is_alive()


def test_dropped_engine_stops_its_threads() -> None:
    before = set(threading.enumerate())
    engine = slow_engine()
    engine.generate([1], SamplingParams(max_tokens=2)).result(10)
    del engine
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before


EXITS = {
    "streaming": "handle = engine.generate([1], ENDLESS)\nnext_delta = asyncio.run(first(handle))",
    "waiting in a thread": "handle = engine.generate([1], ENDLESS)\nthreading.Thread(target=wait, daemon=True).start()",
    "detached": "engine.submit_request([1], ENDLESS, callback=print)\ntime.sleep(0.05)",
    "abandoned in mid-loop": "asyncio.run(abandon())",
    "never started": "",
}
PROGRAM = """
import asyncio, threading, time
from penstock import InferenceEngine, SamplingParams
from penstock.models.scripted import ScriptedModel

ENDLESS = SamplingParams(max_tokens=1500)
engine = InferenceEngine(ScriptedModel([5], step_s=0.005, max_length=4096), batch_timeout_ms=0)

async def first(handle):
    return await anext(handle)

async def abandon():
    task = asyncio.create_task(first(engine.generate([1], ENDLESS)))
    await asyncio.sleep(0.05)

def wait():
    try:
        handle.result()
    except Exception:
        pass

"""


@pytest.mark.parametrize("how", EXITS)
def test_interpreter_exits_with_a_running_request(how: str) -> None:
    code = PROGRAM + EXITS[how] + "\nprint('end')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("end")
    assert "Traceback" not in done.stderr, done.stderr
    assert "Fatal" not in done.stderr, done.stderr

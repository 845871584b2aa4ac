"""Stopping: everybody who waits is told, nobody waits for ever, whoever it is that stops."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from penstock.api.handle import RequestHandle
from penstock.engine.inference import InferenceEngine
from penstock.errors import EngineClosed
from penstock.models.scripted import ScriptedModel
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import SamplingParams
from penstock.step import StepPlan, StepResult
from tests.scripted_engine import join_threads

ENDLESS = SamplingParams(max_tokens=100_000)
PROMPTLY_S = 30.0  # on a busy machine; all the ways to wait for ever take much longer
PATIENCE_S = 60.0
PROGRAM_S = 100.0  # importing PyTorch alone may take a minute
GONE_S = 2.0  # half of it is what engines may take when a program ends
ATTEMPTS = 5


def slow_engine(**settings: Any) -> InferenceEngine:
    """Endless requests take 200 s each."""
    return InferenceEngine(
        ScriptedModel([5, 6, 7], step_s=0.002), **{"batch_timeout_ms": 0, "max_sequence_length": None, **settings}
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
    engine.stop(drain=PATIENCE_S)
    assert all(handle.result(0).generated_ids == [5, 6, 7, 5, 6, 7, 5, 6, 7, 5] for handle in handles)


def test_stop_without_draining_ends_every_waiter_promptly() -> None:
    engine = slow_engine(max_batch_size=2)
    handles = [begun(engine), *(engine.generate([1], ENDLESS) for _ in range(20))]
    begin = time.monotonic()
    engine.stop(0)
    for handle in handles:
        with pytest.raises(EngineClosed):
            handle.result(0)
    assert time.monotonic() - begin < PROMPTLY_S


def test_drain_that_takes_too_long_is_cut_off() -> None:
    engine = slow_engine()
    handle = begun(engine)
    while not engine.get_stats()["totals"]["generated_tokens"]:
        time.sleep(0.001)
    engine.stop(drain=0.1)
    with pytest.raises(EngineClosed) as caught:
        handle.result(0)
    assert isinstance(caught.value.output, RequestOutput)
    assert caught.value.output.generated_ids


def test_waiters_in_other_loops_are_told() -> None:
    engine = slow_engine()
    endings: list[BaseException] = []

    async def wait() -> None:
        try:
            await engine.generate([1], ENDLESS)
        except EngineClosed as error:
            endings.append(error)

    threads = [threading.Thread(target=asyncio.run, args=(wait(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    while engine.get_stats()["queue"]["num_running"] < 3:
        time.sleep(0.001)
    engine.stop(0)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(endings) == 3


def test_stop_twice_and_from_two_threads_at_once() -> None:
    engine = slow_engine()
    handle = begun(engine)
    threads = [threading.Thread(target=engine.stop, args=(0.1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
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
    stopping = threading.Thread(target=engine.stop, args=(PATIENCE_S,))
    stopping.start()

    def submit_until_refused() -> None:
        while True:
            engine.generate([1], SamplingParams(max_tokens=1)).detach()
            time.sleep(0.001)

    with pytest.raises(EngineClosed):
        submit_until_refused()
    assert not handle.done()
    handle.cancel()
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()


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
    assert stopped.wait(PATIENCE_S)


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
    model = StoppingModel([5])
    engine = InferenceEngine(model, batch_timeout_ms=0, max_sequence_length=None)
    model.during_step = lambda: engine.stop(0)
    handle = engine.generate([1], ENDLESS)
    with pytest.raises(EngineClosed):
        handle.result(PATIENCE_S)


def test_engine_collected_as_garbage_on_the_models_thread_ends() -> None:
    """The garbage collector runs where it likes. On the model's thread the finalizer waited for itself."""
    before = set(threading.enumerate())  # those of engines that other tests share
    model = StoppingModel([5], step_s=0.002)
    engine = InferenceEngine(model, batch_timeout_ms=0, max_sequence_length=None)
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
        assert collected.wait(PATIENCE_S)
    finally:
        model.during_step = None
        gc.enable()
    join_threads(before)


def test_dropped_engine_stops_its_threads() -> None:
    before = set(threading.enumerate())
    engine = slow_engine()
    engine.generate([1], SamplingParams(max_tokens=2)).result(PATIENCE_S)
    del engine
    gc.collect()
    join_threads(before)


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

ENDLESS = SamplingParams(max_tokens=100_000)
engine = InferenceEngine(ScriptedModel([5], step_s=0.005), batch_timeout_ms=0, max_sequence_length=None)

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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("end")
    assert "Traceback" not in done.stderr, done.stderr
    assert "Fatal" not in done.stderr, done.stderr


# What takes longer than GONE_S when the program ends. `sys.exit` gets the right code, exceptions their traceback.
BUSY = {
    "a step that takes 50 s": "handle = InferenceEngine(ScriptedModel([5], step_s=50)).generate([1], LONG)\nwait(0.3)",
    "a callback that takes 50 s": (
        "engine = InferenceEngine(ScriptedModel([5]))\n"
        "engine.generate([1], LONG, callback=lambda delta: wait(50)).detach()\nwait(0.3)"
    ),
    "a model that loads": "engine = InferenceEngine()\nengine.generate('a', LONG).detach()\nwait(0.3)",
    "a model that loads for a daemon thread": (
        "def serve():\n    InferenceEngine().generate('a', LONG).result()\n"
        "threading.Thread(target=serve, daemon=True).start()\nwait(0.5)"
    ),
    "a dropped engine that loads": "InferenceEngine().generate('a', LONG).detach()\ngc.collect()",
    "a model that serves": (
        "engine = InferenceEngine()\nengine.start()\n"
        "handles = [engine.generate('a', LONG) for _ in range(4)]\nwait(0.1)"
    ),
}
ENDINGS = {"": (0, ""), "sys.exit(3)": (3, ""), "raise ValueError('mine')": (1, "ValueError: mine")}
BUSY_PROGRAM = """
import atexit, gc, sys, threading, time
atexit.register(lambda: print(time.monotonic()))  # the last to run; what the interpreter itself takes comes after it
from penstock import InferenceEngine, SamplingParams
from penstock.models.scripted import ScriptedModel

LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
wait = time.sleep
{busy}
print(time.monotonic(), flush=True)
{ending}
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("busy", "ending"), [*((busy, "") for busy in BUSY), *(("a model that loads", e) for e in ENDINGS if e)]
)
def test_a_program_that_ends_while_the_engine_works_is_gone_soon(busy: str, ending: str) -> None:
    """It waited for the step that ran, for the model that loaded, and 10 s for callbacks."""
    command = [sys.executable, "-c", BUSY_PROGRAM.format(busy=BUSY[busy], ending=ending)]
    status, says = ENDINGS[ending]

    def seconds_to_end() -> float:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S, check=False)
        assert (done.returncode, done.stderr.strip().rpartition("\n")[2]) == (status, says), done.stderr
        begin, end = map(float, done.stdout.split())
        return end - begin

    assert_gone_soon(seconds_to_end)


def assert_gone_soon(seconds_to_end: Callable[[], float]) -> None:
    """One of several programs ends soon: what other programs do may delay any of them."""
    seconds: list[float] = []
    while not seconds or seconds[-1] >= GONE_S:
        assert len(seconds) < ATTEMPTS, seconds
        seconds.append(seconds_to_end())


FINALIZED = """
import os, signal, sys, threading, time, weakref
from penstock import InferenceEngine, SamplingParams
from penstock.api import exiting
from penstock.models.scripted import ScriptedModel

exiting.EXIT_S = 60  # the machine may be busy
reading, writing = os.pipe()
is_running, was_interrupted = threading.Event(), threading.Event()

class Model(ScriptedModel):
    def execute(self, plan, masks=None):
        is_running.set()
        os.read(reading, 1)  # like a kernel, which no exception ends
        return super().execute(plan, masks)

class Library:
    pass

def on_alarm(number, frame):
    was_interrupted.set()
    raise KeyboardInterrupt

def is_waiting_for_the_step():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code is not exiting.interrupt.__code__:
        frame = frame.f_back
    return frame is not None

def end_the_step_while_the_program_ends():
    while not is_waiting_for_the_step():
        time.sleep(0.001)
    if {is_interrupted}:
        os.kill(os.getpid(), signal.SIGALRM)
        was_interrupted.wait()
    time.sleep(0.3)  # for finalizers that do not wait
    os.write(writing, b"x")

engine = InferenceEngine(Model([5], max_length=4096), batch_timeout_ms=0)
handle = engine.generate([1], SamplingParams(max_tokens=1500))
library = Library()
weakref.finalize(library, lambda: print([t.name for t in threading.enumerate() if t.name.startswith("penstock-model")]))
signal.signal(signal.SIGALRM, on_alarm)
threading.Thread(target=end_the_step_while_the_program_ends, daemon=True).start()
is_running.wait()
"""


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_the_models_thread_has_ended_when_libraries_are_finalized(is_interrupted: bool) -> None:
    """The finalizers of torch ran beside its kernels, before the exit handler and after one that Ctrl-C had ended."""
    code = FINALIZED.format(is_interrupted=is_interrupted)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert "Traceback" not in done.stderr, done.stderr


INTERRUPTED = """
import asyncio
from penstock import InferenceEngine

async def main():
    print("begun", flush=True)
    async with InferenceEngine():
        await asyncio.Event().wait()  # loading may have ended before Ctrl-C comes

asyncio.run(main())
"""


@pytest.mark.timeout(600)
def test_ctrl_c_while_a_model_loads_ends_the_program() -> None:
    """asyncio waited for the thread in which the engine waited for its model."""

    def seconds_to_end() -> float:
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for background jobs
        )
        assert process.stdout is not None
        process.stdout.readline()
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PROGRAM_S)
        assert stderr.strip().endswith(b"KeyboardInterrupt")
        return time.monotonic() - begin

    assert_gone_soon(seconds_to_end)


async def test_cancelling_the_start_waits_for_no_model() -> None:
    gate = threading.Event()
    before = set(threading.enumerate())

    class Slow(ScriptedModel):
        def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
            gate.wait()

    engine = InferenceEngine(Slow([5]))
    entering = asyncio.create_task(engine.__aenter__())
    await asyncio.sleep(0)
    assert engine.get_stats()["engine_status"] == "loading"
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    del engine, entering
    await asyncio.sleep(0)  # until then asyncio holds the error, and with it the engine
    gc.collect()  # an engine that was only dropped is not waited for
    gate.set()
    join_threads(before)

"""No process outlives a start that fails, is cancelled or is cut off, over stand-ins for vLLM and SGLang."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from penstock import ConfigurationError, EngineClosed, SamplingParams
from penstock.backends.engine_start import EngineStart, Processes
from penstock.backends.hosted import HostedEngine
from penstock.backends.sglang_engine import SGLangEngine
from penstock.backends.vllm_engine import VLLMEngine
from tests.unit.backends import fake_sglang, fake_vllm

ENGINES: dict[str, tuple[Any, type[Any], Callable[[str], HostedEngine]]] = {
    "vllm": (fake_vllm, fake_vllm.FakeLLM, VLLMEngine),
    "sglang": (fake_sglang, fake_sglang.Engine, SGLangEngine),
}


def spawn() -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    return process


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An engine of which two processes start."""
    stand_in, kind, _ = ENGINES[request.param]
    stand_in.install(monkeypatch)
    monkeypatch.setattr(kind, "num_processes", 2)
    before = set(multiprocessing.active_children())
    yield request.param
    assert set(multiprocessing.active_children()) == before


@pytest.fixture
def engine(name: str) -> HostedEngine:
    return ENGINES[name][2]("m")


@pytest.fixture
def never_ready(name: str, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set as soon as both processes have started, for which the engine's start then waits."""
    has_started, start, count = threading.Event(), BaseProcess.start, 0

    def note(process: BaseProcess) -> None:
        nonlocal count
        start(process)
        count += 1
        if count == 2:
            has_started.set()

    monkeypatch.setattr(ENGINES[name][1], "never_ready", True)
    monkeypatch.setattr(BaseProcess, "start", note)
    return has_started


def test_an_engine_that_cannot_be_used_after_its_start_is_ended(
    engine: HostedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM ran on, and `stop` did not end it either."""

    def fail(tokenizer: object) -> None:
        raise RuntimeError("no tokenizer")

    monkeypatch.setattr(f"{type(engine).__module__}.Encoder", fail)
    with pytest.raises(RuntimeError, match="no tokenizer") as caught:
        engine.start()
    assert caught.traceback  # which holds the engine
    assert not multiprocessing.active_children()


async def test_after_such_a_failure_the_next_request_starts_the_engine_anew(
    engine: HostedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"{type(engine).__module__}.Encoder", None)
        with pytest.raises(Exception, match="NoneType"):
            await engine.tokenize("a")
        assert not multiprocessing.active_children()
    assert (await engine.generate([1], SamplingParams(temperature=0, max_tokens=2))).generated_ids == [0, 1]
    assert len(multiprocessing.active_children()) == 2
    await asyncio.to_thread(engine.stop, 0)


async def test_stopping_an_engine_that_starts_does_not_wait_for_it(
    engine: HostedEngine, never_ready: threading.Event
) -> None:
    handle = engine.generate([1])
    assert await asyncio.to_thread(never_ready.wait, 60)
    await asyncio.to_thread(engine.stop, 0)
    assert not multiprocessing.active_children()
    with pytest.raises(EngineClosed, match="was stopped"):
        await handle


async def test_a_cancelled_block_ends_the_engine_that_starts_for_it(
    engine: HostedEngine, never_ready: threading.Event
) -> None:
    """The start went on, nobody left the block, and the engine ran until the end of the program."""

    async def enter() -> None:
        async with engine:
            raise AssertionError("it was entered")

    entering = asyncio.ensure_future(enter())
    assert await asyncio.to_thread(never_ready.wait, 60)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert not multiprocessing.active_children()
    with pytest.raises(EngineClosed):
        engine.start()


def test_ctrl_c_while_an_engine_starts_ends_it(engine: HostedEngine, never_ready: threading.Event) -> None:
    def interrupt() -> None:
        assert never_ready.wait(60)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what runs behind them
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            engine.start()
    finally:
        signal.signal(signal.SIGINT, previous)
    thread.join()
    assert not multiprocessing.active_children()


# Nothing here, but what starts the engine, imports the exit handlers of `multiprocessing`.
PROGRAM = """
import asyncio, threading
from penstock.backends.engine_start import EngineStart

has_started = threading.Event()

def start(processes):
    with processes.recorded():
        import multiprocessing, time
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        process.start()
        has_started.set()
        process.join()
        raise RuntimeError("the process ended")

if __name__ == "__main__":
    threading.Thread(target=lambda: asyncio.run(EngineStart(start).result()), daemon=True).start()
    assert has_started.wait(60)
    raise SystemExit(3)
"""


def test_a_program_that_ends_while_an_engine_starts_ends_its_processes() -> None:
    """They hold the program's output open: it is read to its end. The program waited for the end of the start."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_other_threads_start_processes_of_their_own() -> None:
    processes, others = Processes(), []
    with processes.recorded():
        recorded = spawn()
        thread = threading.Thread(target=lambda: others.append(spawn()))
        thread.start()
        thread.join()
    assert [*processes] == [recorded]
    processes.end()
    assert (recorded.is_alive(), others[0].is_alive()) == (False, True)
    others[0].kill()
    others[0].join()


def test_processes_end_with_their_children() -> None:
    with multiprocessing.Manager() as manager:
        ids, is_there = manager.list(), manager.Event()
        processes = Processes()
        with processes.recorded():
            process = multiprocessing.get_context("spawn").Process(target=have_a_child, args=(ids, is_there))
            process.start()
        assert is_there.wait(60)
        processes.end()
        assert not process.is_alive()
        assert wait_for_the_end_of(*ids)


def have_a_child(ids: Any, is_there: Any) -> None:
    """The body of a process that starts another one."""
    child = spawn()
    ids.append(child.pid)
    is_there.set()
    child.join()


def wait_for_the_end_of(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE or psutil.Process(pid).wait(60) is None
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_starts_after_the_end_is_killed_at_once() -> None:
    processes = Processes()
    processes.kill()
    with processes.recorded(), pytest.raises(EngineClosed, match="was cancelled"):
        spawn()
    assert not multiprocessing.active_children()
    processes.end()


async def test_a_start_that_ends_the_program_is_an_error() -> None:
    """vLLM leaves so where it does not know an option; the event loop would end."""
    with pytest.raises(Exception, match="SystemExit: 2"):
        await EngineStart(lambda processes: sys.exit(2)).result()


async def test_a_cancelled_start_that_has_succeeded_has_its_result() -> None:
    """So that it can be closed."""
    may_end = threading.Event()
    starting = asyncio.ensure_future(EngineStart(lambda processes: may_end.wait(60)).result())
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.sleep(0)
    may_end.set()
    assert await starting is True


def test_an_error_of_the_start_is_the_error() -> None:
    def fail(processes: Processes) -> None:
        raise ConfigurationError("no such model")

    with pytest.raises(ConfigurationError, match="no such model"):
        asyncio.run(EngineStart(fail).result())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not told that its parent has ended")
def test_a_program_that_is_killed_takes_the_processes_with_it() -> None:
    """They hold the program's output open: it is read to its end."""
    program = PROGRAM.replace("raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-9, "", "")


async def test_processes_outlive_the_start_that_has_succeeded() -> None:
    """SGLang's are killed when the thread that started them ends."""

    def start(processes: Processes) -> BaseProcess:
        with processes.recorded():
            return spawn()

    earlier, starting = set(threading.enumerate()), EngineStart(start)
    process = await starting.result()
    (thread,) = [each for each in set(threading.enumerate()) - earlier if each.name == "penstock-start"]
    assert (thread.is_alive(), process.is_alive()) == (True, True)
    starting.processes.end()
    thread.join(60)
    assert (thread.is_alive(), process.is_alive()) == (False, False)

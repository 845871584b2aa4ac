"""The engine is a guest in somebody's program: it changes nothing there, runs on any loop and thread, and goes away.

What the module of a trainer looks like is checked before, during and after it was borrowed.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from torch import nn

from penstock import (
    LLM,
    AsyncEngineArgs,
    AsyncLLMEngine,
    EngineClosed,
    InferenceEngine,
    SamplingParams,
    ScriptedModel,
)
from tests.drive import greedy_by_transformers
from tests.scripted_engine import HoldingModel
from tests.tiny_models import build

PATIENCE_S = 30.0
ROOT = Path(__file__).resolve().parents[2]
THREE = SamplingParams(max_tokens=3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = [3, 4, 5, 6, 7]


def new_engine() -> InferenceEngine:
    return InferenceEngine(ScriptedModel([5, 6, 7], max_length=256), skip_tokenizer_init=True)


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel([5, 6, 7], max_length=256)


@pytest.fixture
def engine(model: ScriptedModel) -> Iterator[InferenceEngine]:
    made = InferenceEngine(model, skip_tokenizer_init=True)
    yield made
    made.stop(0.0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE_S
    pulse = threading.Event()
    while not condition():
        assert monotonic() < deadline, "the condition did not come true in time"
        pulse.wait(0.002)


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("penstock")}


def in_thread(work: Callable[[], Any]) -> Any:
    """The result of `work` on a thread of its own; a hang is a failure."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert found, "the thread raised or hangs"
    return found[0]


def run_script(source: str, *arguments: str) -> str:
    """Run a program without a `__main__` guard in a new interpreter; what it printed. Warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


# Nothing global changes.

SNAPSHOT = """
import asyncio, json, logging, multiprocessing, os, random, signal, sys, threading

def snapshot():
    import numpy, torch
    root = logging.getLogger()
    return {
        "loop policy": type(asyncio.get_event_loop_policy()).__qualname__,
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "root logger": [root.level, [type(handler).__name__ for handler in root.handlers]],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "environment": dict(os.environ),
        "hooks": [str(sys.excepthook), str(threading.excepthook), str(sys.unraisablehook), str(sys.displayhook)],
        "random": [str(random.getstate()), str(numpy.random.get_state()), str(torch.random.get_rng_state().tolist())],
        "switch interval": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "folder": os.getcwd(),
        "umask": os.umask(os.umask(0o22)),
        "streams": [str(sys.stdout), str(sys.stderr)],
    }

def changes(before, after):
    return sorted(name for name in before if before[name] != after[name])
"""

IMPORT_AND_CONSTRUCT = (
    SNAPSHOT
    + """
import pydantic_settings, structlog  # what is measured is the engine, not its libraries
before = snapshot()
import penstock
from penstock import LLM, AsyncEngineArgs, AsyncLLMEngine, InferenceEngine, ScriptedModel
engine = InferenceEngine(ScriptedModel([5], max_length=64), skip_tokenizer_init=True)
engine = InferenceEngine()
AsyncLLMEngine.from_engine_args(AsyncEngineArgs())
print(json.dumps({"changed": changes(before, snapshot()), "heavy": "transformers" in sys.modules}))
"""
)


def test_importing_and_constructing_changes_no_global_state() -> None:
    assert json.loads(run_script(IMPORT_AND_CONSTRUCT)) == {"changed": [], "heavy": False}


LOAD_AND_GENERATE = (
    SNAPSHOT
    + """
import pydantic_settings, structlog, transformers.models.llama.modeling_llama
before = snapshot()
from penstock import LLM, SamplingParams
llm = LLM(dtype="float32", max_num_seqs=2)
[output] = llm.generate("def f", SamplingParams(max_tokens=3))
llm.stop()
left = [thread for thread in threading.enumerate() if thread.name.startswith("penstock")]
for thread in left:
    thread.join(30)
alive = [thread.name for thread in left if thread.is_alive()]
print(json.dumps({"changed": changes(before, snapshot()), "alive": alive, "text": output.text}))
"""
)


def test_loading_and_generating_changes_no_global_state_either() -> None:
    """Also the proof that no `__main__` guard is needed: this is the top level of a script."""
    found = json.loads(run_script(LOAD_AND_GENERATE))
    assert (found["changed"], found["alive"]) == ([], [])
    assert found["text"]


LEFT_OVER = """
import asyncio, sys, threading
from penstock import InferenceEngine, SamplingParams, ScriptedModel
async def first(handle):
    return await anext(handle)
idle, never = (InferenceEngine(ScriptedModel([5], max_length=64), skip_tokenizer_init=True) for _ in range(2))
idle.generate([1], SamplingParams(max_tokens=2)).result(30)
called_back = threading.Event()
def callback(output):
    sys.stdout.write("called back\\n")
    called_back.set()
idle.submit_request([1], SamplingParams(max_tokens=2), callback=callback)
called_back.wait(30)
busy = InferenceEngine(ScriptedModel([5], max_length=4096, step_s=0.005), skip_tokenizer_init=True)
handle = busy.generate([1], SamplingParams(max_tokens=4000))
asyncio.run(first(handle))
sys.stdout.write("the end\\n")
"""


def test_a_script_ends_although_it_stopped_no_engine() -> None:
    """One engine was never started, one is idle, one is in the middle of a request."""
    assert sorted(run_script(LEFT_OVER).splitlines()) == ["called back", "the end"]


# Loops and threads.


async def three(engine: InferenceEngine) -> list[int]:
    return (await engine.generate(PROMPT, THREE)).generated_ids


def test_one_engine_serves_one_loop_after_another(engine: InferenceEngine) -> None:
    for _ in range(3):
        assert asyncio.run(three(engine)) == [5, 6, 7]


def test_one_engine_serves_plain_threads(engine: InferenceEngine) -> None:
    assert in_thread(lambda: engine.generate(PROMPT, THREE).result(PATIENCE_S).generated_ids) == [5, 6, 7]
    assert in_thread(lambda: asyncio.run(three(engine))) == [5, 6, 7]


def test_one_engine_serves_two_loops_at_once(engine: InferenceEngine) -> None:
    together = threading.Barrier(2)

    async def streams() -> list[list[int]]:
        async def stream() -> list[int]:
            return [token async for delta in engine.generate(PROMPT, THREE) for token in delta.token_ids]

        together.wait(PATIENCE_S)
        return await asyncio.gather(*(stream() for _ in range(20)))

    found: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(streams()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == [[[5, 6, 7]] * 20] * 2


def test_sync_generation_works_inside_a_running_loop() -> None:
    """As in a notebook, whose cells run inside a loop."""

    async def cell() -> list[int]:
        llm = LLM(ScriptedModel([5, 6, 7], max_length=64), skip_tokenizer_init=True)
        [output] = llm.generate([PROMPT], THREE)
        llm.stop()
        return output.generated_ids

    assert asyncio.run(cell()) == [5, 6, 7]


def test_one_engine_serves_uvloop_and_the_standard_loop(engine: InferenceEngine) -> None:
    uvloop = pytest.importorskip("uvloop")
    for factory in (uvloop.new_event_loop, asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(three(engine)) == [5, 6, 7]


def test_a_loop_that_ends_in_mid_stream_harms_nobody(engine: InferenceEngine) -> None:
    async def leave() -> str:
        handle = engine.generate(PROMPT, SamplingParams(max_tokens=200))
        await anext(handle)
        return handle.request_id

    asyncio.run(leave())
    wait_until(lambda: engine.get_stats()["queue"]["num_requests"] == 0)
    assert asyncio.run(three(engine)) == [5, 6, 7]


def test_a_blocked_loop_delays_nobody_else(engine: InferenceEngine) -> None:
    blocked, done = threading.Event(), threading.Event()

    async def blocks() -> list[int]:
        handle = engine.generate(PROMPT, THREE)
        blocked.set()
        done.wait(PATIENCE_S)
        return (await handle).generated_ids

    thread = threading.Thread(target=lambda: asyncio.run(blocks()))
    thread.start()
    blocked.wait(PATIENCE_S)
    assert asyncio.run(three(engine)) == [5, 6, 7]
    done.set()
    thread.join(PATIENCE_S)


def test_an_engine_is_an_async_context() -> None:
    async def main() -> list[int]:
        async with new_engine() as engine:
            return await three(engine)

    before = own_threads()
    assert asyncio.run(main()) == [5, 6, 7]
    wait_until(lambda: own_threads() <= before)


FORK = """
import os, signal, sys, warnings
from penstock import EngineClosed, InferenceEngine, SamplingParams, ScriptedModel
engine = InferenceEngine(ScriptedModel([5, 6, 7], max_length=64), skip_tokenizer_init=True)
if sys.argv[1] == "started":
    engine.start()
warnings.simplefilter("ignore")  # newer Pythons warn of threads at a fork, which is the point here
pid = os.fork()
if pid == 0:
    signal.alarm(30)  # a child that hangs is killed, and its parent says so
    calls = [lambda: engine.generate([1]), engine.start, lambda: engine.submit_request([1])]
    refused = 0
    for call in calls:
        try:
            call()
        except EngineClosed as error:
            refused += "fork" in str(error)
    own = InferenceEngine(ScriptedModel([8], max_length=64), skip_tokenizer_init=True)
    own_works = own.generate([1], SamplingParams(max_tokens=2)).result(20).generated_ids == [8, 8]
    engine.get_stats()
    engine.stop()
    os._exit(0 if refused == len(calls) and own_works else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(status, engine.generate([1], SamplingParams(max_tokens=3)).result(30).generated_ids)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("state", ["started", "constructed"])
def test_a_forked_child_is_refused_and_the_parent_serves_on(state: str) -> None:
    """The engine's threads do not exist in the child: waiting for them would hang. A new engine works there."""
    assert run_script(FORK, state) == "0 [5, 6, 7]\n"


# Borrowed modules.


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Everything that an owner can see of a module."""
    config: Any = module.config
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "places": {name: tensor.data_ptr() for name, tensor in module.named_parameters()},
        "trainable": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "training": {name: child.training for name, child in module.named_modules()},
        "kinds": {name: type(child) for name, child in module.named_modules()},
        "forwards": {name: child.forward.__func__ for name, child in module.named_modules()},
        "attention": config._attn_implementation,
        "config": copy.deepcopy(config.to_dict()),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    states = before.pop("state"), after.pop("state")
    assert before == after
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_borrowed_module_is_the_same_before_during_and_after(name: str, training: bool) -> None:
    module = build(name).train(training)
    next(module.parameters()).requires_grad_(False)
    before = fingerprint(module)
    engine = InferenceEngine(module, skip_tokenizer_init=True)
    output = engine.generate(PROMPT, GREEDY).result(PATIENCE_S)
    assert_same(dict(before), fingerprint(module))
    assert output.generated_ids == greedy_by_transformers(module.eval(), PROMPT, 6)
    module.train(training)
    engine.stop()
    assert_same(dict(before), fingerprint(module))


def loss_of(module: nn.Module) -> torch.Tensor:
    ids = torch.tensor([PROMPT])
    loss: torch.Tensor = module(input_ids=ids, labels=ids).loss
    return loss


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss_of(module).backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_training_works_while_the_engine_runs_and_after() -> None:
    module = build("llama").train()
    wanted = gradients(module)
    engine = InferenceEngine(module, skip_tokenizer_init=True)
    engine.start()
    running = engine.generate(PROMPT, SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    during = gradients(module)
    assert len(running.result(PATIENCE_S).generated_ids) == 400
    engine.stop()
    after = gradients(module)
    for found in (during, after):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
        assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if "weight" in name)


def test_an_optimizer_step_shows_in_the_next_new_text() -> None:
    module = build("llama")
    engine = InferenceEngine(module, skip_tokenizer_init=True)
    before = engine.generate(PROMPT, GREEDY).result(PATIENCE_S).generated_ids
    optimizer = torch.optim.SGD(module.parameters(), lr=3.0)
    gradients(module)
    optimizer.step()
    prompt = [9, *PROMPT]  # another text: what is cached of the old one was computed with the old weights
    wanted = greedy_by_transformers(module, prompt, 6)
    assert engine.generate(prompt, GREEDY).result(PATIENCE_S).generated_ids == wanted
    assert before != greedy_by_transformers(module, PROMPT, 6)
    engine.stop()


def test_two_engines_may_borrow_one_module() -> None:
    module = build("llama")
    engines = [InferenceEngine(module, skip_tokenizer_init=True) for _ in range(2)]
    handles = [engine.generate(PROMPT, GREEDY) for engine in engines]
    wanted = greedy_by_transformers(module, PROMPT, 6)
    assert [handle.result(PATIENCE_S).generated_ids for handle in handles] == [wanted, wanted]
    for engine in engines:
        engine.stop()


# Going away.


def test_dropping_the_last_reference_stops_the_threads() -> None:
    for make in (
        new_engine,
        lambda: LLM(ScriptedModel([5], max_length=64), skip_tokenizer_init=True),
        lambda: AsyncLLMEngine(new_engine()),
        lambda: AsyncLLMEngine.from_engine_args(
            AsyncEngineArgs(ScriptedModel([5], max_length=64), skip_tokenizer_init=True)
        ),
    ):
        before = own_threads()  # of engines that end just now, too
        owner: Any = make()
        engine = getattr(owner, "engine", owner)
        engine.generate(PROMPT, THREE).result(PATIENCE_S)
        engine.submit_request(PROMPT, THREE, callback=lambda output: None)
        assert own_threads() - before
        dead = weakref.ref(engine)
        del owner, engine
        wait_until(lambda d=dead: gc.collect() >= 0 and d() is None)  # type: ignore[misc]
        wait_until(lambda b=before: own_threads() <= b)  # type: ignore[misc]


def test_a_borrowed_module_is_let_go_with_the_engine() -> None:
    module = build("llama")
    dead = weakref.ref(module)
    engine = InferenceEngine(module, skip_tokenizer_init=True)
    engine.generate(PROMPT, THREE).result(PATIENCE_S)
    del engine, module
    wait_until(lambda: gc.collect() >= 0 and dead() is None)


def test_a_handle_keeps_its_engine_alive() -> None:
    handle = new_engine().generate(PROMPT, THREE)
    gc.collect()
    assert handle.result(PATIENCE_S).generated_ids == [5, 6, 7]


def test_dropping_a_handle_aborts_its_request(engine: InferenceEngine, model: ScriptedModel) -> None:
    model.hold()
    engine.generate(PROMPT, SamplingParams(max_tokens=250))
    wait_until(lambda: engine.get_stats()["totals"]["requests"] == 1)
    model.release()
    assert engine.get_stats()["queue"]["num_finished_abort"] <= 1
    assert engine.get_stats()["queue"]["num_finished_length"] == 0


def test_stopping_twice_and_from_several_threads_is_harmless(engine: InferenceEngine) -> None:
    engine.start()
    threads = [threading.Thread(target=engine.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    engine.stop()


def test_a_coroutine_may_stop_the_engine_that_it_waits_for() -> None:
    model = HoldingModel([5, 6, 7], hold_at=2, max_length=256)
    engine = InferenceEngine(model, skip_tokenizer_init=True)

    async def main() -> None:
        handle = engine.generate(PROMPT, SamplingParams(max_tokens=250))
        await anext(handle)
        closing = asyncio.create_task(engine.aclose(drain=0.0))
        with pytest.raises(EngineClosed, match="the engine was stopped") as caught:
            await handle
        assert caught.value.output is not None
        assert caught.value.output.generated_ids
        model.release()
        await closing

    awaiting: Coroutine[Any, Any, None] = main()
    asyncio.run(awaiting)

"""How many files and calls does a request pass on its way through the engine?

One text request runs after two others that warm up every cache. A profile function on all threads records each call of
a Python function of the package, as `sys.setprofile` reports it: resumed coroutines and comprehensions count too.
Threads take turns while they are recorded, so the counts depend on the code and never on timing. Reported are

  first delta  everything from `generate` until the caller holds the first delta, on all threads
  steady step  one decode step, from the start of a forward pass to the start of the next, on the engine's thread and
               on the model's; what the caller does to take the delta is listed beside it

By default the model is a `ScriptedModel`, so that the path is the engine's own; `--model demo` takes the small model in
the package. The walk goes to stderr: each function under its file, with the thread that calls it and the number of its
calls, in the order of the first calls. Thread changes are counted along the path of the request. A turn in which the
model's thread only reports that it has started is in the list of turns, but not in the count.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import penstock
from harness.console import finish, note
from harness.options import parser_for
from penstock import Delta, EngineConfig, InferenceEngine, SamplingParams, ScriptedModel
from penstock.cli.session import quiet_libraries
from penstock.demo import MODEL_DIR
from penstock.models.protocol import ModelRunner
from penstock.step import StepPlan, StepResult

PACKAGE = str(Path(penstock.__file__).parent) + "/"
CALLER, ENGINE, MODEL = "caller", "engine", "model"
NEW_TOKENS, STEADY_STEP = 12, 6
PAUSE_S = 0.1
LOOP_TURNS = 8  # of an event loop, after which it has run everything that one callback leads to
WARM_UP_PROMPTS, PROMPT = ("def first(values):\n", "def second(items):\n"), "def third(numbers):\n"
SCRIPT = (5, 42, 79, 116)  # ordinary tokens of the small model


class Call(NamedTuple):
    """A call of a function of the package; `file` is "" where the runner starts a forward pass."""

    thread: str
    file: str
    function: str


@dataclass(slots=True)
class Recorder:
    """Records calls on every thread that starts while it is installed, and lets these threads take turns.

    The engine's thread runs whenever it has something to do; every other thread waits for its event loop to be idle
    before it takes a turn.
    """

    calls: list[Call] = field(default_factory=list)
    recording: bool = False
    num_calls: int = 0
    engine_loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Profile this thread and those that start from now on."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    async def settled(self) -> None:
        """Return once nothing calls the package: what follows the end of a request is over."""
        num_calls = -1
        while num_calls != self.num_calls:
            num_calls = self.num_calls
            await asyncio.sleep(PAUSE_S)

    def add(self, call: Call) -> None:
        """Record a call, once it is the thread's turn."""
        if self.calls and self.calls[-1].thread != call.thread and call.thread != ENGINE:
            wait_idle(self.engine_loop)
        self.calls.append(call)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        self.num_calls += 1
        thread = thread_name()
        if thread == ENGINE and self.engine_loop is None:
            self.engine_loop = running_loop()
        if self.recording:
            code = frame.f_code
            self.add(Call(thread, code.co_filename.removeprefix(PACKAGE), code.co_qualname))


def thread_name() -> str:
    """What the running thread is for: caller, engine, model or tokenizer."""
    name = threading.current_thread().name
    return name.removeprefix("penstock-").rstrip("-0123456789") if name.startswith("penstock-") else CALLER


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs on this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def wait_idle(loop: asyncio.AbstractEventLoop | None) -> None:
    """Block this thread until another thread's event loop has run everything that was due."""
    if loop is None or loop is running_loop():
        return
    idle = threading.Event()

    def turn(turns_left: int) -> None:
        if turns_left:
            loop.call_soon(turn, turns_left - 1)
        else:
            idle.set()

    loop.call_soon_threadsafe(turn, LOOP_TURNS)
    idle.wait()


@dataclass(slots=True)
class RecordedRunner:
    """A model's runner that divides the record into steps: step i ends where the forward pass of step i + 1 starts."""

    runner: ModelRunner
    recorder: Recorder
    caller_loop: asyncio.AbstractEventLoop
    first_delta_recorded: asyncio.Event = field(default_factory=asyncio.Event)
    steps: list[list[Call]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a step after the other threads have come to rest."""
        if self.recorder.recording:
            for loop in (self.recorder.engine_loop, self.caller_loop, self.recorder.engine_loop):
                wait_idle(loop)
            self.steps.append(self.recorder.calls)
            self.recorder.calls = [Call(MODEL, "", "forward pass")]
            if len(self.steps) == 2:
                self.caller_loop.call_soon_threadsafe(self.first_delta_recorded.set)
                wait_idle(self.caller_loop)
        return self.runner.execute(plan)


def load(model: str, config: EngineConfig) -> tuple[ModelRunner, Any]:
    """The scripted model, or the small one in the package, and a tokenizer."""
    from transformers import AutoTokenizer

    from penstock.models import loading

    if model == "demo":
        loaded = loading.load(str(MODEL_DIR), None, config)
        return loaded.runner, loaded.tokenizer
    return ScriptedModel(SCRIPT, vocab_size=4096), AutoTokenizer.from_pretrained(str(MODEL_DIR))


async def record(model: str) -> list[list[Call]]:
    """The calls until the first forward pass starts, and from there those of every step."""
    config = EngineConfig(log_level="ERROR")
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    runner, tokenizer = load(model, config)
    recorder = Recorder()
    recorded = RecordedRunner(runner, recorder, asyncio.get_running_loop())
    with recorder.installed():
        async with InferenceEngine(recorded, tokenizer, config) as engine:
            for prompt in WARM_UP_PROMPTS:
                await engine.generate(prompt, params)
                await recorder.settled()
            recorder.recording = True
            await submit(engine, params, recorded)
            recorder.recording = False
    return recorded.steps


async def submit(engine: InferenceEngine, params: SamplingParams, recorded: RecordedRunner) -> None:
    """Submit the request and read its deltas. The engine's thread goes on once the caller waits."""
    submitted = threading.Event()
    assert recorded.recorder.engine_loop is not None, "no call was seen on the engine's thread"
    recorded.recorder.engine_loop.call_soon_threadsafe(submitted.wait)
    reader = asyncio.ensure_future(read(engine.generate(PROMPT, params), recorded.first_delta_recorded))
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)
    submitted.set()
    await reader


async def read(deltas: AsyncIterator[Delta], first_delta_recorded: asyncio.Event) -> None:
    """Take the first delta, and the others once that is recorded."""
    await anext(deltas)
    await first_delta_recorded.wait()
    async for _ in deltas:
        pass


def measure(model: str) -> list[list[Call]]:
    """`record`, with the garbage collector off: finalizers would call the package whenever they happen to run."""
    gc.disable()
    try:
        return asyncio.run(record(model))
    finally:
        gc.enable()


def first_delta(steps: Sequence[Sequence[Call]]) -> list[Call]:
    """The calls of the request's first step, and those before it."""
    return [*steps[0], *steps[1]]


def steady_step(steps: Sequence[Sequence[Call]], threads: Sequence[str] = (ENGINE, MODEL)) -> list[Call]:
    """The calls of a decode step on these threads."""
    return [call for call in steps[STEADY_STEP] if call.thread in threads]


def counts(calls: Sequence[Call]) -> dict[str, int]:
    """Number of files and of calls."""
    inside = [call for call in calls if call.file]
    return {"files": len({call.file for call in inside}), "calls": len(inside)}


def turns(calls: Sequence[Call]) -> list[tuple[str, list[Call]]]:
    """The calls of each thread between two changes of thread."""
    return [(thread, list(group)) for thread, group in groupby(calls, key=lambda call: call.thread)]


def thread_changes(calls: Sequence[Call]) -> int:
    """How often the request changes threads; a model's thread that runs no forward pass only reports its start."""
    path = [thread for thread, group in turns(calls) if thread != MODEL or any(not call.file for call in group)]
    return len(list(groupby(path))) - 1


def summary(steps: Sequence[Sequence[Call]]) -> dict[str, Any]:
    """All counts."""
    delta = first_delta(steps)
    return {
        "first_delta": {
            **counts(delta),
            "thread_changes": thread_changes(delta),
            "turns": [thread for thread, _ in turns(delta)],
        },
        "steady_step": {
            **counts(steady_step(steps)),
            **{thread: counts(steady_step(steps, [thread])) for thread in (ENGINE, MODEL, CALLER)},
        },
    }


def show_walk(title: str, calls: Sequence[Call]) -> None:
    """Print each function once, under its file and in the order of the first calls, with its thread and calls."""
    note(f"\n{title}")
    totals = Counter(call for call in calls if call.file)
    for file, group in groupby(totals, key=lambda call: call.file):
        note(f"  {file}")
        for call in group:
            note(f"    {call.thread:<9} {totals[call]:>4} x {call.function}")


def main() -> None:
    """Record the request, print the walk and the JSON line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", choices=("scripted", "demo"), default="scripted", help="(default: scripted)")
    args = parser.parse_args()
    quiet_libraries()
    steps = measure(args.model)
    show_walk("first delta", first_delta(steps))
    show_walk("steady step", steady_step(steps))
    show_walk("steady step, the caller", steady_step(steps, [CALLER]))
    finish({"model": args.model, **summary(steps)})


if __name__ == "__main__":
    main()

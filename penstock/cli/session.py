"""An engine for the duration of one command, and one request streamed from it.

Owns loading, interruption and the CLI's event loop. Signals are handled here and in no lower layer: `asyncio.Runner`
turns Ctrl-C into the cancellation of what it runs, which aborts the request. Called by the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from penstock.api.event_loop import new_event_loop
from penstock.api.prompt import Prompt
from penstock.api.protocols import Engine
from penstock.cli.terminal import note, status_line
from penstock.config import EngineConfig
from penstock.engine.inference import InferenceEngine
from penstock.models.hub import is_cached
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import SamplingParams

T = TypeVar("T")

JsonObject = dict[str, Any]  # plain data for a JSON document
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
INTERRUPTED = 130  # the exit code that shells expect after Ctrl-C
_FLUSH_S = 0.2  # for the last output of a process that ends at once


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds as seen by the reader, and the new tokens of all completions."""

    first_token_s: float
    total_s: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """New tokens over the total time, prefill included."""
        return self.num_tokens / self.total_s if self.total_s > 0 else 0.0


@contextlib.contextmanager
def loaded_engine(model: Any = None, tokenizer: Any = None, **settings: Any) -> Iterator[InferenceEngine]:
    """`started_engine`, with a status line while it loads. Raises `ConfigurationError`."""
    engine = InferenceEngine(model, tokenizer, **settings)
    with started_engine(engine, loading_line(model, engine.config)):
        yield engine


@contextlib.contextmanager
def started_engine(engine: Engine, loading: AbstractContextManager[None] | None = None) -> Iterator[None]:
    """Start an engine, inside `loading`; at the end abort all its requests and stop it.

    Ctrl-C ends the process at once while the engine loads, or while it is stopped, which waits for a running step.
    """
    with exit_on_interrupt(), loading or contextlib.nullcontext():
        quiet_libraries()
        engine.start()
    try:
        yield
    finally:
        with exit_on_interrupt():
            engine.stop(drain=0.0)


def loading_line(model: object, config: EngineConfig) -> AbstractContextManager[None]:
    """A status line for the time of loading; a note instead where the hub library shows progress bars of its own."""
    if not isinstance(model, str):
        return status_line("loading the model")
    folder = Path(model).expanduser()
    if folder.is_dir():
        num_bytes = sum(file.stat().st_size for file in folder.glob("*") if file.suffix in WEIGHT_FILES)
        return status_line(f"loading {model} ({num_bytes / 1e6:,.0f} MB)")
    if is_cached(model, config, weights=True):
        return status_line(f"loading {model}")
    if sys.stderr.isatty():
        note(f"loading {model} from the hub")
    return contextlib.nullcontext()


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once: loading weights cannot be cancelled, and a regular exit would wait for it."""
    try:
        yield
    except KeyboardInterrupt:
        exit_at_once()


def exit_at_once() -> NoReturn:
    """End the process with the exit code of an interruption, even if its output is not read."""

    def flush() -> None:
        with contextlib.suppress(OSError, ValueError):
            note("\ninterrupted")
            sys.stdout.flush()

    thread = threading.Thread(target=flush, daemon=True)  # a full pipe, or a lock of this thread's, may block it
    thread.start()
    thread.join(_FLUSH_S)
    os._exit(INTERRUPTED)


async def interruptible(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine of an `asyncio.Runner`: Ctrl-C cancels it, and once more ends the process at once.

    That holds until the process ends and while this thread is blocked, as by output that nobody reads.
    """
    cancel = signal.getsignal(signal.SIGINT)
    if not callable(cancel) or threading.current_thread() is not threading.main_thread():
        return await coroutine

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: exit_at_once())
        cancel(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        return await coroutine
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, cancel)


def quiet_libraries() -> None:
    """Silence transformers, and the progress bar of loading weights; the bars of downloads stay."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        enable_progress_bars()


def new_runner() -> asyncio.Runner:
    """A runner with the CLI's own event loop, uvloop's where that is installed."""
    return asyncio.Runner(loop_factory=new_event_loop)


def params_with(engine: InferenceEngine, settings: Mapping[str, Any]) -> SamplingParams:
    """The engine's default parameters, overridden by the settings of the command line."""
    return replace(engine.default_params(), **settings)


async def stream(
    engine: Engine, prompt: Prompt, params: SamplingParams | None, show: Callable[[Delta], None]
) -> tuple[RequestOutput, Timing]:
    """Run one request and show every delta as it arrives.

    Being cancelled aborts the request, and so does an exception of `show`.
    """
    start_s, first_token_s = time.perf_counter(), None
    async with engine.generate(prompt, params) as handle:
        async for delta in handle:
            if first_token_s is None and delta.token_ids:
                first_token_s = time.perf_counter() - start_s
            show(delta)
        output = await handle
    total_s = time.perf_counter() - start_s
    num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    return output, Timing(total_s if first_token_s is None else first_token_s, total_s, num_tokens)


def run_on_own_thread(function: Callable[..., T], *args: object) -> T:
    """Call a function on a thread that ends with the call.

    PyTorch's worker threads belong to the thread that computes. While two such teams exist on one machine, OpenMP puts
    waiting workers to sleep, and small operations take twice as long: engine and baseline must not leave a team behind.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, name="penstock-cli", daemon=True)
    thread.start()
    result = future.result()
    thread.join()
    return result

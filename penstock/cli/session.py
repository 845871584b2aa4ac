"""An engine for the length of one command, and one request streamed from it.

Owns loading, leaving and the CLI's event loop. Signals are handled here and in no lower layer: `asyncio.Runner` turns
Ctrl-C into the cancellation of what it runs, and so into the abort of the request. Called by the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from penstock.api.event_loop import new_event_loop
from penstock.api.prompt import Prompt
from penstock.cli.terminal import note, waiting_for
from penstock.engine.inference import InferenceEngine
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import SamplingParams

T = TypeVar("T")

INTERRUPTED = 130  # what shells expect after Ctrl-C


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds as the reader saw them, and new tokens of all completions."""

    first_token_s: float
    total_s: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """New tokens over the whole time, prefill included."""
        return self.num_tokens / self.total_s if self.total_s > 0 else 0.0


@contextlib.contextmanager
def loaded_engine(model: Any = None, tokenizer: Any = None, **settings: Any) -> Iterator[InferenceEngine]:
    """A started engine; stopped, with whatever still runs aborted, at the end. Raises `ConfigurationError`."""
    engine = InferenceEngine(model, tokenizer, **settings)
    with leaving_at_once(), waiting_for(f"loading {model if isinstance(model, str) else 'the model'} ..."):
        quiet_libraries()
        engine.start()
    try:
        yield engine
    finally:
        engine.stop(drain=0.0)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the process. The reading of weights cannot be cancelled, and a regular exit would wait for it."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            note("\ninterrupted")
            sys.stdout.flush()
        os._exit(INTERRUPTED)


def quiet_libraries() -> None:
    """No bar for weights that load in a moment, no chatter; bars of downloads stay."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        enable_progress_bars()


def event_loop() -> asyncio.Runner:
    """A loop of the CLI's own, uvloop's where that is installed."""
    return asyncio.Runner(loop_factory=new_event_loop)


def params_for(engine: InferenceEngine, given: dict[str, Any], max_tokens: int) -> SamplingParams:
    """The model's own defaults, with `max_tokens` where these have none, and what was given on the command line."""
    return replace(engine.default_params(max_tokens), **given)


async def stream(
    engine: InferenceEngine, prompt: Prompt, params: SamplingParams, show: Callable[[Delta], None]
) -> tuple[RequestOutput, Timing]:
    """Run one request and show every delta as it comes. Being cancelled, or `show` raising, aborts the request."""
    begin, first = time.perf_counter(), None
    async with engine.generate(prompt, params) as handle:
        async for delta in handle:
            if first is None and delta.token_ids:
                first = time.perf_counter() - begin
            show(delta)
        output = await handle
    total = time.perf_counter() - begin
    return output, Timing(total if first is None else first, total, sum(len(out.token_ids) for out in output.outputs))


def alone(function: Callable[..., T], *args: Any) -> T:
    """Run on a thread of its own that ends with it.

    PyTorch's helpers belong to the thread that computes. While two such teams exist on one machine, OpenMP puts waiting
    helpers to sleep, and small operations take twice as long: neither side may leave a team behind.
    """
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(function(*args))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=work, name="penstock-alone", daemon=True)
    thread.start()
    found = result.result()
    thread.join()
    return found

"""An engine that owns its vLLM: what starting it leaves behind, and what waits when vLLM's process dies."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

from penstock import EngineClosed, PenstockError, SamplingParams
from penstock.backends import create_backend
from penstock.backends.vllm_engine import VLLMEngine
from penstock.errors import ConfigurationError
from tests.integration.backends.vllm_engines import MODEL, OPTIONS, needs_vllm

pytestmark = needs_vllm

LONG = SamplingParams(max_tokens=1500, ignore_eos=True)


def state_of_the_process() -> dict[str, Any]:
    """What a library must not change."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return {
        "signals": handlers,
        "policy": type(asyncio.get_event_loop_policy()),
        "environment": dict(os.environ),
        "root logger": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "start method": multiprocessing.get_start_method(allow_none=True),
    }


async def test_starting_changes_nothing_and_a_dead_process_fails_every_waiter() -> None:
    before, others = state_of_the_process(), multiprocessing.active_children()
    share = {"gpu_memory_utilization": OPTIONS["gpu_memory_utilization"]}
    specific = {**share, "options": {name: value for name, value in OPTIONS.items() if name not in share}}
    backend = create_backend({"backend_type": "vllm", "model_name": MODEL, "backend_specific": specific})
    await asyncio.to_thread(backend.load)
    engine: Any = backend.backend.engine
    assert backend.generate("x", max_length=2, return_logits=True)["logits"].shape == (2, 4096)
    assert state_of_the_process() == before
    assert len((await engine.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))).generated_ids) == 4

    handles = [engine.generate([1, 2, token], LONG) for token in range(1, 5)]
    for handle in handles:
        await anext(handle)
    waiters: list[asyncio.Future[Any]] = [asyncio.ensure_future(handle) for handle in handles]
    waiters.append(asyncio.ensure_future(engine.update_weights(MODEL, mode="wait")))  # waits for the four
    (child,) = [process for process in multiprocessing.active_children() if process not in others]
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    began = time.monotonic()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    print(f"all waiters failed after {time.monotonic() - began:.2f} s")
    assert all(isinstance(result, EngineClosed) for result in results), results
    with pytest.raises(EngineClosed):
        await engine.generate([1, 2, 3], LONG)
    with pytest.raises(PenstockError):
        await engine.update_weights(MODEL)
    await asyncio.to_thread(backend.close)
    assert set(multiprocessing.active_children()) == set(others)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("penstock")]
    assert state_of_the_process() == before


async def test_a_start_whose_caller_leaves_ends_the_process_that_it_has_started() -> None:
    others = set(multiprocessing.active_children())

    async def enter() -> None:
        async with VLLMEngine(MODEL, **OPTIONS):
            raise AssertionError("it was entered")

    entering = asyncio.ensure_future(enter())
    while set(multiprocessing.active_children()) == others and not entering.done():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.05)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert set(multiprocessing.active_children()) == others
    assert not [thread.name for thread in threading.enumerate() if thread.name == "penstock-start"]


def test_bad_options_are_one_sentence() -> None:
    with pytest.raises(
        ConfigurationError, match=r"no option 'tensor_paralel_size': did you mean 'tensor_parallel_size'"
    ):
        VLLMEngine(MODEL, tensor_paralel_size=2).start()
    with pytest.raises(ConfigurationError, match="cannot start /no/such/model"):
        VLLMEngine("/no/such/model").start()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "penstock-vllm"]


def test_options_for_several_devices_reach_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """000-54, 000-69: Ray is not installed here, and there is one device: the options are seen where vLLM starts."""
    from vllm.v1.engine.async_llm import AsyncLLM

    seen: list[Any] = []

    def refuse(arguments: Any, *others: Any) -> None:
        seen.append(arguments)
        raise RuntimeError("seen")

    monkeypatch.setattr(AsyncLLM, "from_engine_args", refuse)
    with pytest.raises(ConfigurationError, match="seen"):
        VLLMEngine(MODEL, tensor_parallel_size=2, pipeline_parallel_size=2, distributed_executor_backend="ray").start()
    (arguments,) = seen
    assert (arguments.tensor_parallel_size, arguments.pipeline_parallel_size) == (2, 2)
    assert (arguments.distributed_executor_backend, arguments.scheduling_policy) == ("ray", "priority")

"""Real vLLM engines on the shipped model, for the tests that run in an environment with vLLM (`scripts/test-vllm`)."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import pytest

import penstock
from penstock import InferenceEngine
from penstock.api.event_loop import LoopThread
from penstock.backends.config import VLLMBackendConfig
from penstock.backends.engine_start import Processes
from penstock.backends.vllm_process import start_vllm, stop_vllm
from penstock.training.vllm import VLLMBackend

RunningLLM: TypeAlias = tuple[Any, asyncio.AbstractEventLoop]  # an `AsyncLLM`, and the loop on which it runs

MODEL = str(Path(penstock.__file__).parent / "demo" / "model")
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**28,
    "gpu_memory_utilization": 0.2,
}

# Otherwise the first request for log probabilities compiles functions of torch for half a minute.
NO_COMPILING = ("TORCHDYNAMO_DISABLE", "1")

IS_INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = [
    pytest.mark.skipif(not IS_INSTALLED, reason="vLLM is not installed here: scripts/test-vllm installs it"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]


@contextmanager
def running_llm(**options: Any) -> Iterator[RunningLLM]:
    """An `AsyncLLM` on the shipped model."""
    thread, processes = LoopThread("vllm"), Processes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*NO_COMPILING)
        llm = start_vllm(processes, MODEL, OPTIONS | options)
    try:
        yield llm, thread.loop
    finally:
        stop_vllm(llm, processes)
        thread.close(wait=True)


def start_server(port: int, log: IO[str]) -> subprocess.Popen[bytes]:
    """vLLM's own server on the shipped model, as a child process."""
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in OPTIONS.items()
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, f"--port={port}"]
    return subprocess.Popen([*command, *options], stdout=log, stderr=log, env=os.environ | dict([NO_COMPILING]))


def native(model: str = MODEL) -> InferenceEngine:
    """The native engine on the same weights, in fp32."""
    return InferenceEngine(model, dtype="float32", device="cpu", max_logprobs=-1)


@contextmanager
def backends_over(llm: RunningLLM) -> Iterator[None]:
    """A block in which backends of vLLM use this one instead of starting their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLLMBackendConfig, "open", lambda config, model: VLLMBackend(llm[0], loop=llm[1]))
        yield

"""What the program sets for all of PyTorch, at any moment and on any thread, changes no request of an engine.

Settings of the whole process: the default dtype, deterministic algorithms, the precision of float32 products. Settings
of a thread, which the engine's own has for itself: the default device, grad and inference mode, autocast, denormal
numbers, and the number of threads, with which later threads begin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from penstock import InferenceEngine, RequestHandle, SamplingParams
from penstock.kernels.native import available
from tests.tiny_models import build

REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "logprobs": 3},
    {"top_p": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.2},
    {"top_k": 5, "min_p": 0.01, "prompt_logprobs": 2},
    {"temperature": 0.0, "logit_bias": {5: 1.0}, "bad_words": [[3, 4]], "min_tokens": 4},
    {"allowed_token_ids": [3, 4, 5, 6]},
    {"use_beam_search": True, "best_of": 3, "temperature": 0.0, "logit_bias": {5: 1.0}, "logprobs": 1},
    {"n": 2, "min_p": 0.1},
)
WAYS: dict[str, dict[str, Any]] = {"kernels": {"weight_mode": "packed"}, "plain": {"disabled_rewrites": ("kernels",)}}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "deterministic algorithms": deterministic,
    "three threads": lambda: threads(3),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "grad": lambda: torch.set_grad_enabled(True),
    "denormals": flushed_denormals,
}


class Served(NamedTuple):
    """An engine, and what it gives when nobody touches anything."""

    way: str
    engine: InferenceEngine
    wanted: list[Any]


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    if request.param == "kernels" and not available():
        pytest.skip("no compiler")
    engine = engine_of(request.param, build("llama"))
    exact = outputs_of(submitted(engine))
    # In plain torch, who shares a step may change the last bits.
    yield Served(request.param, engine, [(tokens, pytest.approx(logprobs, abs=1e-4)) for tokens, logprobs in exact])
    engine.stop()


def engine_of(way: str, model: nn.Module) -> InferenceEngine:
    return InferenceEngine(model, skip_tokenizer_init=True, num_threads=1, enable_kv_cache=False, **WAYS[way])


def submitted(engine: InferenceEngine) -> list[RequestHandle]:
    return [
        engine.generate([7 + i] * (5 + 9 * i), SamplingParams(max_tokens=8, seed=i, **kind))
        for i, kind in enumerate(REQUESTS)
    ]


def outputs_of(handles: list[RequestHandle]) -> list[Any]:
    """Tokens and log probabilities of everything generated."""
    outputs = [output for handle in handles for output in handle.result(60).outputs]
    return [(list(output.token_ids), output.token_logprobs) for output in outputs]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_made_before_requests_changes_none(served: Served, setting: Callable[[], Any]) -> None:
    """Buffers of the default dtype were too small for what kernels wrote: the process was aborted, 8 times of 8."""
    with setting():
        assert outputs_of(submitted(served.engine)) == served.wanted


def test_settings_made_on_another_thread_while_requests_run_change_none(served: Served) -> None:
    stop = threading.Event()

    def fiddle() -> None:
        while not stop.is_set():
            for setting in SETTINGS.values():
                with setting():
                    stop.wait(0.002)

    other = threading.Thread(target=fiddle)
    other.start()
    try:
        found = [outputs_of(submitted(served.engine)) for _ in range(3)]
    finally:
        stop.set()
        other.join()
    assert found == [served.wanted] * 3


@pytest.mark.parametrize("name", [name for name in SETTINGS if "dtype" in name or "device" in name])
def test_an_engine_that_starts_under_a_setting_gives_the_same(served: Served, name: str) -> None:
    model = build("llama")
    with SETTINGS[name]():
        engine = engine_of(served.way, model)
        engine.start()
        found = outputs_of(submitted(engine))
        engine.stop()
    assert found == served.wanted


def test_fused_layers_heed_no_precision_of_float32_products(served: Served) -> None:
    """Plain torch does: what the program allows for its own products holds for those of the modules as they are."""
    if served.way == "plain":
        pytest.skip("the program's own choice")
    with precision("medium"):
        assert outputs_of(submitted(served.engine)) == served.wanted

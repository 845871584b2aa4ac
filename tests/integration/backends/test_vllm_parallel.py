"""Tensor parallelism on vLLM: two ranks on two cores give the values of the native engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from penstock.backends import create_backend
from tests.integration.backends.vllm_engines import MODEL, NO_COMPILING, OPTIONS, needs_vllm

pytestmark = [
    *needs_vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, two ranks need two of them"),
]

PROMPTS, RESPONSES = ["Once upon a time there was a little", "x"], [" girl", " = 1"]


def test_two_ranks_give_the_logits_and_the_tokens_of_the_native_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """002-19, 000-54."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv(*NO_COMPILING)
    options = {name: value for name, value in OPTIONS.items() if name != "gpu_memory_utilization"}
    specific: dict[str, Any] = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.2, "options": options}
    parallel = create_backend({"backend_type": "vllm", "model_name": MODEL, "backend_specific": specific})
    settings = {"device": "cpu", "torch_dtype": "float32"}
    native = create_backend({"backend_type": "native", "model_name": MODEL, "backend_specific": settings})
    for name in ("get_logits", "get_probabilities"):
        pairs = zip(getattr(parallel, name)(PROMPTS, RESPONSES), getattr(native, name)(PROMPTS, RESPONSES), strict=True)
        for found, expected in pairs:
            np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=name)
    texts = [each.generate(PROMPTS, max_length=12, do_sample=False) for each in (parallel, native)]
    assert texts[0] == texts[1]
    parallel.close()
    native.close()

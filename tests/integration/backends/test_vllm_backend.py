"""`create_backend` over real vLLM: the values are those of the native engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from penstock import InferenceModule, RequestError
from penstock.backends import BackendConfig, BaseBackend, HuggingFaceBackendConfig, create_backend
from tests.integration.backends.vllm_engines import MODEL, RunningLLM, backends_over, needs_vllm

pytestmark = needs_vllm

PROMPTS = ["Once upon a time there was a little", "import os", "x"]
RESPONSES = [" girl", "\n\nclass Reader:", " = 1"]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def vllm(llm_with_logits: RunningLLM) -> Iterator[BaseBackend]:
    with backends_over(llm_with_logits):
        backend = create_backend(BackendConfig("vllm", MODEL))
        backend.load()
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def native() -> Iterator[BaseBackend]:
    settings = HuggingFaceBackendConfig(device="cpu", torch_dtype="float32")
    backend = create_backend(BackendConfig("native", MODEL, settings))
    yield backend
    backend.close()


def test_scores_agree_with_the_native_engine(vllm: BaseBackend, native: BaseBackend) -> None:
    """Ragged pairs in one call. Logits are compared as they are: both engines return the model's own."""
    for name in ("get_logits", "get_logprobs", "get_probabilities"):
        own, others = getattr(native, name)(PROMPTS, RESPONSES), getattr(vllm, name)(PROMPTS, RESPONSES)
        difference = 0.0
        for expected, found in zip(own, others, strict=True):
            assert found.shape == expected.shape
            difference = max(difference, float(np.abs(found - expected).max()))
        print(f"{name}: largest difference {difference:.2e}")
        assert difference < TOLERANCE


def test_generation_agrees_with_the_native_engine(vllm: BaseBackend, native: BaseBackend) -> None:
    flags = {"max_length": 12, "do_sample": False, "return_logits": True, "return_probs": True}
    for expected, found in zip(native.generate(PROMPTS, **flags), vllm.generate(PROMPTS, **flags), strict=True):
        assert (found["text"], found["token_ids"]) == (expected["text"], expected["token_ids"])
        assert found["finish_reason"] == expected["finish_reason"]
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=TOLERANCE)
        np.testing.assert_allclose(found["probs"], expected["probs"], atol=TOLERANCE)
    stopped = [each.generate(PROMPTS[0], 40, do_sample=False, stop_strings=[" the"]) for each in (native, vllm)]
    assert stopped[0] == stopped[1]


def test_an_inference_module_runs_over_it(vllm: BaseBackend, native: BaseBackend) -> None:
    flags = {"max_new_tokens": 8, "do_sample": False, "return_logits": True, "return_logprobs": True}
    expected, found = (InferenceModule(backend=each.backend).generate(PROMPTS, **flags) for each in (native, vllm))
    assert found.token_ids == expected.token_ids
    for own, other in ((expected.logprobs, found.logprobs), (expected.logits, found.logits)):
        assert own is not None
        assert other is not None
        for values, others in zip(own, other, strict=True):
            np.testing.assert_allclose(others, values, atol=TOLERANCE)


def test_texts_are_encoded_alike(vllm: BaseBackend, native: BaseBackend) -> None:
    ids = native.encode(["Hello, world!", "x"])
    assert vllm.encode(["Hello, world!", "x"]) == ids
    assert vllm.decode(ids) == native.decode(ids) == ["Hello, world!", "x"]


def test_gradients_are_refused(vllm: BaseBackend) -> None:
    with pytest.raises(RequestError, match="computes no gradients"):
        vllm.get_logits("x", "y", compute_gradients=True)

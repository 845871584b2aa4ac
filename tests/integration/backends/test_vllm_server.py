"""vLLM's own server over HTTP: the contract, and the records of a service client."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.api.protocols import Engine
from penstock.backends import create_inference_service_client
from penstock.backends.openai_engine import OpenAIEngine
from penstock.testing.contract import EngineContract
from tests.integration.backends.vllm_engines import MODEL, native, needs_vllm

pytestmark = needs_vllm


class TestVLLMServer(EngineContract):
    url = ""

    @pytest.fixture(autouse=True)
    def _connect(self, vllm_server: str) -> None:
        self.url = vllm_server

    def make_engine(self) -> Engine:
        return OpenAIEngine(self.url, return_token_ids=True)


@pytest.mark.parametrize("backend", ["openai", "vllm"])
async def test_records_of_a_service_client_hold_the_ids_and_log_probabilities_of_vllm(
    backend: str, vllm_server: str
) -> None:
    """With "openai" the ids, which are the names of tokens, were read as numbers and failed."""
    section = {"backend": backend, "base_url": vllm_server, "model": MODEL, "api_key": "EMPTY", "max_tokens": 12}
    client = create_inference_service_client({"inference_service": section, "temperature": 1.0})
    messages = [{"role": "user", "content": "Tell me a story."}]
    async with native() as engine:
        for prompt, response in (
            ({"prompt": "Once upon a time"}, await client.acompletion("Once upon a time")),
            (messages, await client.agenerate(messages)),
        ):
            record = response["nexrl_train"]
            assert record["prompt_tokens"] == await engine.tokenize(prompt)
            assert len(record["response_tokens"]) == len(record["response_logprobs"]) == 12
            (score,) = await engine.score([record["prompt_tokens"]], [record["response_tokens"]])
            np.testing.assert_allclose(score.logprobs, record["response_logprobs"], atol=1e-3)
    await client.aclose()

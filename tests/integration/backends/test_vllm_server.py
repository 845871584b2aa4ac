"""The contract over HTTP to vLLM's own server."""

from __future__ import annotations

import pytest

from penstock.api.protocols import Engine
from penstock.backends.openai_engine import OpenAIEngine
from penstock.testing.contract import EngineContract
from tests.integration.backends.vllm_engines import needs_vllm

pytestmark = needs_vllm


class TestVLLMServer(EngineContract):
    url = ""

    @pytest.fixture(autouse=True)
    def _connect(self, vllm_server: str) -> None:
        self.url = vllm_server

    def make_engine(self) -> Engine:
        return OpenAIEngine(self.url, return_token_ids=True)

"""The contract on real vLLM."""

from __future__ import annotations

import pytest

from penstock.api.protocols import Engine
from penstock.backends.vllm_engine import VLLMEngine
from penstock.testing.contract import EngineContract
from tests.integration.backends.vllm_engines import RunningLLM, needs_vllm

pytestmark = needs_vllm


class TestVLLMEngine(EngineContract):
    shared: RunningLLM

    @pytest.fixture(autouse=True)
    def _share(self, llm_with_logits: RunningLLM) -> None:
        self.shared = llm_with_logits

    def make_engine(self) -> Engine:
        llm, loop = self.shared
        return VLLMEngine(llm, loop=loop)

"""The contract on real vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.api.protocols import Engine
from penstock.backends.vllm_engine import VLLMEngine
from penstock.testing.contract import EngineContract
from tests.integration.backends.vllm_engines import needs_vllm, running_llm

pytestmark = needs_vllm


class TestVLLMEngine(EngineContract):
    shared: tuple[Any, asyncio.AbstractEventLoop]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with running_llm() as cls.shared:
            yield

    def make_engine(self) -> Engine:
        llm, loop = self.shared
        return VLLMEngine(llm, loop=loop)

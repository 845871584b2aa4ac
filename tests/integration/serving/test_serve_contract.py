"""The contract over HTTP to `penstock serve`, a process of its own that serves the shipped model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.api.protocols import Engine
from penstock.backends.openai_engine import OpenAIEngine
from penstock.testing.contract import EngineContract
from tests.integration.serving.test_serve_command import process, url_of


class TestPenstockServe(EngineContract):
    url = ""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with process("--port", "0", "--device", "cpu", "--dtype", "float32") as server:
            cls.url = url_of(server)
            yield

    def make_engine(self) -> Engine:
        return OpenAIEngine(self.url, return_token_ids=True)

"""The contract over HTTP to vLLM's own server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from penstock.api.protocols import Engine
from penstock.backends.openai_engine import OpenAIEngine
from penstock.testing.contract import EngineContract
from tests.integration.backends.vllm_engines import MODEL, OPTIONS, needs_vllm

pytestmark = needs_vllm
START_S = 500.0


class TestVLLMServer(EngineContract):
    url = ""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
        options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if value is not True]
        flags = [f"--{name.replace('_', '-')}" for name, value in OPTIONS.items() if value is True]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, f"--port={port}"]
        with log.open("w") as output:
            server = subprocess.Popen([*command, *options, *flags], stdout=output, stderr=output)
        cls.url = f"http://127.0.0.1:{port}"
        try:
            wait_until_healthy(cls.url, server, log)
            yield
        finally:
            server.terminate()
            server.wait()

    def make_engine(self) -> Engine:
        return OpenAIEngine(self.url, return_token_ids=True)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Poll the server, which tells nobody that it is ready."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])

"""vLLM, started once for all tests of a run: the start takes longer than the tests of a file."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.integration.backends.vllm_engines import IS_INSTALLED, RunningLLM, running_llm, start_server

START_S = 500.0


@pytest.fixture(scope="session", autouse=True)
def _server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, subprocess.Popen[bytes], Path] | None]:
    """vLLM's server, if a test of the run needs it: it starts beside the tests that do not."""
    items: list[Any] = request.session.items
    if not IS_INSTALLED or not any("vllm_server" in item.fixturenames for item in items):
        yield None
        return
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as output:
        server = start_server(port, output)
    yield port, server, log
    server.terminate()
    try:
        server.wait(30)
    finally:
        server.kill()


@pytest.fixture(scope="session")
def vllm_server(_server: tuple[int, subprocess.Popen[bytes], Path]) -> str:
    """The address of vLLM's server, which tells nobody that it is ready: it is polled."""
    port, server, log = _server
    end, url = time.monotonic() + START_S, f"http://127.0.0.1:{port}"
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return url
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def llm_with_logprobs() -> Iterator[RunningLLM]:
    """vLLM with its own defaults."""
    with running_llm() as llm:
        yield llm


@pytest.fixture(scope="session")
def llm_with_logits() -> Iterator[RunningLLM]:
    """vLLM as `create_backend` starts it."""
    with running_llm(logprobs_mode="raw_logits", max_num_seqs=16) as llm:
        yield llm

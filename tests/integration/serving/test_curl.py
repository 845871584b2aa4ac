"""The curl commands of the README and of docs/serving.md, sent to the model that ships with Penstock."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from penstock import InferenceEngine
from penstock.serving import app
from tests.http_sockets import running

ROOT = Path(__file__).resolve().parents[3]
ADDRESS = "http://127.0.0.1:8000"


def commands() -> list[str]:
    """Every command that begins with curl in a code block, its continued lines joined."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/serving.md")]
    blocks = [block for text in texts for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    return [match for block in blocks for match in re.findall(r"^curl .*?(?=^\S|\Z)", block, re.DOTALL | re.MULTILINE)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the model is served."""
    engine = InferenceEngine(kv_cache_tokens=4096)
    engine.start()
    try:
        with running(app(engine)) as server:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        engine.stop(0)


def test_there_are_commands_to_run() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_is_answered(command: str, address: str) -> None:
    words = shlex.split(command.replace("\\\n", " "))[1:]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0].startswith(ADDRESS)
    assert set(options) == {"-H", "-d"}
    name, value = options["-H"].split(": ")
    response = httpx.post(words[0].replace(ADDRESS, address), content=options["-d"], headers={name: value}, timeout=60)
    assert response.status_code == 200, response.text
    assert response.text

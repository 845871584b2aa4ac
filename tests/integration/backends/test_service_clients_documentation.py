"""The code in docs/service_clients.md runs from top to bottom, against a served engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.serving import app
from tests.http_sockets import running
from tests.scripted_engine import replying_engine

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "service_clients.md").read_text(encoding="utf-8")


def test_code_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    with replying_engine(["The answer is 4."]) as engine, running(app(engine)) as server:
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        for code in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
            exec(code.replace("http://localhost:8000", url).replace("my-model", "scripted"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["True", "[2, 2]"]
    assert printed[2].startswith("The answer is 4. [1, 401, ")
    assert printed[3:] == ["0", "load 1", "1"]

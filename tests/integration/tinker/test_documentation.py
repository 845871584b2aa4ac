"""`docs/tinker.md`: its examples run as they stand, against `penstock serve --tinker` as a process."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker

from penstock.cli import main
from penstock.serving.process import ProcessSettings
from penstock.serving.tinker.settings import TinkerSettings
from tests.integration.serving.test_serve_command import process, url_of
from tests.integration.tinker.service import Running
from tests.tiny_models import build
from tests.tokenizers_for_tests import byte_level

TEXT = (Path(__file__).parents[3] / "docs" / "tinker.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("saved")
    with process("--port", "0", "--tinker", "--tinker-folder", str(folder)) as server:
        url = url_of(server)
        yield url
        answer = httpx.post(f"{url}/api/v1/create_session", json={}, headers={"x-api-key": "tml-local"})
        assert answer.status_code == 200
        server.terminate()
        assert server.wait(20) == 0  # ended by the signal, with a session open


def test_the_first_example_learns_its_text(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", address)
    monkeypatch.setenv("TINKER_API_KEY", "tml-local")
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[9]) < 1 < 20 < float(lines[0])
    service = names["service"]
    assert isinstance(service, tinker.ServiceClient)
    service.close("success").result()  # its client would ask for the session until the end of the tests


async def test_the_second_example_makes_an_application(tmp_path: Path) -> None:
    names = {"module": build("llama"), "tokenizer": byte_level(), "folder": tmp_path}
    exec(BLOCKS[1], names)
    api, engine = names["api"], names["engine"]
    paths = {route.path for route in api.routes}  # type: ignore[attr-defined]
    assert {"/v1/models", "/api/v1/asample"} <= paths
    await engine.aclose()  # type: ignore[attr-defined]


def test_settings_have_the_sentences_and_defaults_of_the_document() -> None:
    rows = dict(re.findall(r"^\| `(tinker\w*)` \| (\S*) \|", TEXT, re.MULTILINE))
    fields = {name: field for name, field in ProcessSettings.model_fields.items() if name.startswith("tinker")}
    assert rows == {"tinker": "false", "tinker_folder": "", "tinker_session_timeout_s": "600"}
    assert rows.keys() == fields.keys()
    limits = dict(re.findall(r"^\| `(max\w*)` \| (\S*)(?: MiB)? \|", TEXT, re.MULTILINE))
    settings = TinkerSettings()
    assert {name: int(value) for name, value in limits.items()} == {
        **{name: getattr(settings, name) for name in ("max_sessions", "max_pending", "max_models", "max_samplers")},
        "max_answer_bytes": settings.max_answer_bytes >> 20,
    }
    assert (settings.max_loaded_adapters, settings.max_snapshots) == (16, 32)


def test_what_cannot_be_trained_is_refused_before_the_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "answers.yaml").write_text("replies: [x]")
    assert main(["serve", "--tinker", "--model", f"scripted:{tmp_path / 'answers.yaml'}", "--port", "0"]) != 0
    assert "has no weights to train" in capsys.readouterr().err
    assert main(["serve", "--tinker", "--tinker-session-timeout-s", "0", "--port", "0"]) != 0
    assert "tinker_session_timeout_s" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tinker.proto", None)
    assert main(["serve", "--tinker", "--port", "0"]) != 0
    assert "pip install 'penstock[tinker]'" in capsys.readouterr().err


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "--tinker-folder" in capsys.readouterr().out


def test_the_description_of_the_api_has_the_schemas_that_it_refers_to(server: Running) -> None:
    description = httpx.get(f"{server.url}/openapi.json").json()
    references = set(re.findall(r'"#/components/schemas/([\w.-]+)"', json.dumps(description)))
    assert {"CreateModel", "OptimStep", "Sample"} <= references
    assert references <= description["components"]["schemas"].keys()

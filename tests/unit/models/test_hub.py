"""A hub that cannot be reached is asked once, and a model that is not in its cache is refused at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError
from penstock.models import hub
from penstock.models.checkpoint import hub_options
from penstock.models.hub import check_available, is_cached, unreachable

COMMIT = "a" * 40
LIMIT_S = 5.0
ATTEMPTS = 5  # at what a busy machine may spoil


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub that accepts connections and never answers, in place of the real one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(hub, "VALID_S", 0.0)  # an earlier test may have had the same port
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.delenv(name, raising=False)
        yield server
    huggingface_hub.close_session()


def cache_with(folder: Path, *names: str) -> EngineConfig:
    """A hub cache that holds these files of `owner/model`."""
    repository = folder / "models--owner--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in names:
        (snapshot / name).write_text("{}")
    return EngineConfig(download_dir=str(folder))


def refused_soon(folder: Path, says: str) -> None:
    """Check that an unknown name is refused with these words, within the limit in one attempt at least."""
    for _ in range(ATTEMPTS):
        start_s = time.monotonic()
        with pytest.raises(ConfigurationError, match=says):
            check_available("nobody/nothing", EngineConfig(download_dir=str(folder)))
        if (elapsed_s := time.monotonic() - start_s) < LIMIT_S:
            return
    pytest.fail(f"refused after {elapsed_s:.1f} s")


def test_an_unknown_name_is_refused_within_five_seconds_where_the_hub_refuses_connections(
    endpoint: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub library retried every file five times: a minute of silence, or of warnings."""
    endpoint.close()
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")
    refused_soon(tmp_path, r"'nobody/nothing': there is no such folder.* cannot be reached \(")


def test_an_unknown_name_is_refused_within_five_seconds_where_the_hub_never_answers(
    endpoint: socket.socket, tmp_path: Path
) -> None:
    refused_soon(tmp_path, r"cache does not hold it, and http.* (did not answer|cannot be reach)")


def test_the_hub_is_asked_once_for_all_files_of_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            questions.append(url)
            raise ConnectionError("refused")

    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.test")
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert len({unreachable() for _ in range(100)}) == 1
    assert hub_options("owner/model", EngineConfig(download_dir=str(tmp_path)))["local_files_only"]
    assert questions == ["http://hub.test"]


def test_a_cached_model_loads_from_the_cache_where_the_hub_cannot_be_reached(
    endpoint: socket.socket, tmp_path: Path
) -> None:
    endpoint.close()
    config = cache_with(tmp_path, "config.json")
    assert check_available("owner/model", config) == "owner/model"
    assert hub_options("owner/model", config) == {
        "revision": "main",
        "cache_dir": str(tmp_path),
        "local_files_only": True,
    }


def test_offline_mode_is_named_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE is set: check the name, or pass a folder"):
        check_available("nobody/nothing", EngineConfig(download_dir=str(tmp_path)))


def test_a_folder_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: pytest.fail("the hub was asked"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_text("")
    assert check_available(str(tmp_path), EngineConfig()) == str(tmp_path)
    assert not hub_options(str(tmp_path), EngineConfig())["local_files_only"]


def test_a_model_is_cached_with_its_weights_or_without(tmp_path: Path) -> None:
    config = cache_with(tmp_path, "config.json")
    assert is_cached("owner/model", config)
    assert not is_cached("owner/model", config, weights=True)
    assert not is_cached("no hub id//", config)
    complete = cache_with(tmp_path / "complete", "config.json", "model.safetensors")
    assert is_cached("owner/model", complete, weights=True)

"""The server's settings: from keywords, environment and files; what makes no sense is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock import ConfigurationError
from penstock.serving import ApiKey, ServingSettings
from penstock.serving.process import ProcessSettings


def test_keywords_come_before_the_environment_and_that_before_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_SERVE_MAX_STOP", "5")
    monkeypatch.setenv("PENSTOCK_SERVE_SERVED_MODEL_NAME", "a, b")
    (tmp_path / "s.yaml").write_text("max_stop: 6\nmax_choices: 7\nmax_tools: 8\n")
    settings = ServingSettings.from_yaml(tmp_path / "s.yaml", max_choices=9)
    assert (settings.max_stop, settings.max_choices, settings.max_tools) == (5, 9, 8)
    assert settings.served_model_name == ("a", "b")
    assert ServingSettings(max_stop=1).max_stop == 1


def test_names_may_be_separated_by_commas() -> None:
    """As an option, `--served-model-name a,b` was one name."""
    for names in ("a, b", ["a,b"], ("a", "b"), ["a", "b,"]):
        settings = ServingSettings(served_model_name=names, cors_origins=names)  # type: ignore[arg-type]
        assert (settings.served_model_name, settings.cors_origins) == (("a", "b"), ("a", "b"))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"max_bodybytes": 1}, "did you mean 'max_body_bytes'"),
        ({"max_choices": 0}, "max_choices"),
        ({"stall_s": -1}, "stall_s"),
        ({"api_keys": [{"name": "a"}]}, "exactly one of key, sha256, file and env"),
        ({"api_keys": [{"name": "a", "key": "x", "env": "y"}]}, "exactly one"),
        ({"api_keys": [{"name": "a", "sha256": "xyz"}]}, "sha256"),
        ({"api_keys": [{"name": "a", "key": "x"}, {"name": "a", "key": "y"}]}, "same name"),
        ({"api_keys": [{"name": "a", "key": "x", "max_priority": "urgent"}]}, "max_priority"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        ServingSettings(**values)


@pytest.mark.parametrize("file", ["- a\n", "a: [\n", None])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, file: str | None) -> None:
    if file is not None:
        (tmp_path / "s.yaml").write_text(file)
    with pytest.raises(ConfigurationError, match=r"s\.yaml"):
        ServingSettings.from_yaml(tmp_path / "s.yaml")


def test_the_namespace_of_a_key_is_its_name_unless_it_has_one() -> None:
    assert ApiKey(name="a", key="x").cache_namespace == "a"
    assert ApiKey(name="a", key="x", namespace="").cache_namespace == ""


@pytest.mark.parametrize(
    ("host", "is_local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_only_this_machine_is_served_without_keys(host: str, is_local: bool) -> None:
    if is_local:
        assert ProcessSettings(host=host).host == host
    else:
        with pytest.raises(ConfigurationError, match="allow-anonymous"):
            ProcessSettings(host=host)
        ProcessSettings(host=host, allow_anonymous=True)
        ProcessSettings(host=host, api_keys=(ApiKey(name="a", key="x"),))


def test_formats_are_checked_when_the_app_is_made() -> None:
    from penstock import RequestError
    from penstock.serving import app
    from tests.unit.testing.echo import EchoEngine

    engine = EchoEngine()
    for settings in (ServingSettings(tool_format="x"), ServingSettings(reasoning_format="x")):
        with pytest.raises((ConfigurationError, RequestError), match="unknown"):
            app(engine, settings)
    engine.stop(0)


@pytest.mark.parametrize(
    "values",
    [
        {"api_keys": [{"name": "a", "key": "SECRET"}, {"name": "a", "key": "SECRET"}]},
        {"api_keys": [{"name": "a", "key": "SECRET", "env": "X"}]},
        {"api_keys": ["SECRET"]},
        {"api_keys": {"a": "SECRET"}},
        {"api_keys": [{"name": "a", "key": ["SECRET"]}]},
        {"admin_key": ["SECRET"]},
        {"admin_key": "SECRET", "ssl_certfile": "cert.pem"},
        {"admin_key": "SECRET", "host": "0.0.0.0"},
    ],
)
def test_no_error_shows_a_key(values: dict[str, Any]) -> None:
    """Settings that did not fit together were shown with all of their values."""
    with pytest.raises(ConfigurationError) as caught:
        ProcessSettings(**values)
    assert "SECRET" not in str(caught.value)


def test_a_name_that_is_given_twice_is_listed_once() -> None:
    """Regression: `/v1/models` had it twice."""
    assert ServingSettings(served_model_name=("a", "b", "a")).served_model_name == ("a", "b")

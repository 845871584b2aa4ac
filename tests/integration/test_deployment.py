"""The examples of deployment are well formed, and name commands, options, settings and paths that exist."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from penstock.cli.command import make_parser
from penstock.serving.gate import OPEN_PATHS
from penstock.serving.process import ProcessSettings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/deployment"
DIRECTIVES = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def arguments(words: list[str]) -> argparse.Namespace:
    """The parsed arguments of a `penstock` command; an unknown option ends the test."""
    assert Path(words[0]).name == "penstock"
    try:
        return make_parser().parse_args(words[1:])
    except SystemExit:
        pytest.fail(f"{words} has an option that does not exist")


@pytest.fixture
def unit() -> dict[str, dict[str, list[str]]]:
    """The sections of the systemd unit; a key may occur more than once."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in (FOLDER / "penstock.service").read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = sections.setdefault(match[1], {})
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            section.setdefault(key, []).append(value)
    return sections


@pytest.fixture
def dockerfile() -> dict[str, str]:
    """The instructions by name, the last of each; continued lines are joined."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return dict(line.split(maxsplit=1) for line in text.splitlines() if line)  # type: ignore[misc]


def test_the_unit_starts_a_command_that_exists(unit: dict[str, dict[str, list[str]]]) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(FOLDER / "penstock.service")
    assert parser.sections() == list(unit) == ["Unit", "Service", "Install"]
    (command,) = unit["Service"]["ExecStart"]
    parsed = arguments(shlex.split(command))
    assert parsed.model.startswith("/var/lib/penstock/")
    assert unit["Service"]["StateDirectory"] == ["penstock"]


def test_the_unit_waits_until_the_server_has_drained(unit: dict[str, dict[str, list[str]]]) -> None:
    settings = ProcessSettings()
    assert int(unit["Service"]["TimeoutStopSec"][0]) > settings.drain_delay_s + settings.drain_timeout_s


def test_the_key_that_a_comment_shows_is_a_valid_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(FOLDER / name).read_text() for name in ("penstock.service", "Dockerfile")]
    shown = [re.search(r"PENSTOCK_SERVE_API_KEYS='?(\[.*?\])", text) for text in texts]
    for match in shown:
        assert match is not None
        monkeypatch.setenv("PENSTOCK_SERVE_API_KEYS", match[1])
        assert [key.name for key in ProcessSettings(host="0.0.0.0").api_keys] == ["app"]


def test_the_image_starts_a_command_that_exists(dockerfile: dict[str, str]) -> None:
    assert dockerfile.keys() <= DIRECTIVES
    parsed = arguments(json.loads(dockerfile["ENTRYPOINT"]) + json.loads(dockerfile["CMD"]))
    assert (parsed.model, parsed.host, str(parsed.port)) == ("/model", "0.0.0.0", dockerfile["EXPOSE"])


def test_the_image_is_checked_on_a_path_that_needs_no_key(dockerfile: dict[str, str]) -> None:
    words = shlex.split(dockerfile["HEALTHCHECK"].partition("CMD ")[2])
    assert words[0] in (FOLDER / "Dockerfile").read_text().partition("rm -rf")[0].split()  # it is installed
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", " ".join(words))[0]
    assert port == dockerfile["EXPOSE"]
    assert path in OPEN_PATHS


def test_what_the_image_installs_has_the_extras_that_it_names() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", (FOLDER / "Dockerfile").read_text())
    assert set(extras.split(",")) <= known.keys()

"""The examples of deployment are well formed, and name commands, options, settings and paths that exist."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock import EngineConfig
from penstock.cli.command import make_parser
from penstock.serving.gate import OPEN_PATHS
from penstock.serving.process import ProcessSettings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/deploy"
CONFIG = "/etc/penstock/server.yaml"
DIRECTIVES = {"FROM", "RUN", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


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


@pytest.fixture
def sections() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "server.yaml").read_text()))


def test_the_settings_are_those_of_server_and_engine(sections: dict[str, Any]) -> None:
    assert sections.keys() == {"serving", "engine"}
    settings = ProcessSettings.over(sections["serving"], {"host": "0.0.0.0"})  # refused without keys
    assert [key.name for key in settings.api_keys] == ["web", "batch"]
    assert sections["engine"].pop("model").startswith("/")
    EngineConfig(**sections["engine"])


def test_the_unit_starts_a_command_that_exists(unit: dict[str, dict[str, list[str]]]) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read(FOLDER / "penstock.service")
    assert parser.sections() == list(unit) == ["Unit", "Service", "Install"]
    (command,) = unit["Service"]["ExecStart"]
    parsed = arguments(shlex.split(command))
    assert (parsed.config, parsed.host) == (CONFIG, "127.0.0.1")


def test_the_unit_waits_until_the_server_has_drained(
    unit: dict[str, dict[str, list[str]]], sections: dict[str, Any]
) -> None:
    drain_s = sections["serving"]["drain_delay_s"] + sections["serving"]["drain_timeout_s"]
    assert int(unit["Service"]["TimeoutStopSec"][0]) > drain_s


def test_the_image_starts_a_command_that_exists(dockerfile: dict[str, str]) -> None:
    assert dockerfile.keys() <= DIRECTIVES
    parsed = arguments(json.loads(dockerfile["ENTRYPOINT"]) + json.loads(dockerfile["CMD"]))
    assert (parsed.config, parsed.host, str(parsed.port)) == (CONFIG, "0.0.0.0", dockerfile["EXPOSE"])


def test_the_image_is_checked_on_a_path_that_needs_no_key(dockerfile: dict[str, str]) -> None:
    program = json.loads(dockerfile["HEALTHCHECK"].partition("CMD ")[2])[-1]
    compile(program, "HEALTHCHECK", "exec")
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", program)[0]
    assert port == dockerfile["EXPOSE"]
    assert path in OPEN_PATHS


@pytest.mark.parametrize("name", ["penstock.service", "Dockerfile"])
def test_what_is_installed_has_the_extras_that_it_names(name: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = re.findall(r"penstock\[([\w,]+)\]", (FOLDER / name).read_text())
    assert extras
    assert {extra for names in extras for extra in names.split(",")} <= known.keys()

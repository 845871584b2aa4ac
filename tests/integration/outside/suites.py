"""Test suites that others wrote for clients: fetched when the tests run, run in a process of their own, judged here.

Nothing of them is kept in this repository. A suite that cannot be fetched, because the package index is out of reach,
is skipped; every other test of it must pass or be excluded with a reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp

from penstock.serving import ServingSettings, app
from tests.http_sockets import running
from tests.scripted_engine import replying_engine

_UNREACHABLE = re.compile("No matching distribution|Connection|Temporary failure|timed out|Network is unreachable")


@dataclass(frozen=True)
class Exclusion:
    """Tests whose names match do not count, for this reason. With `refused`, they count as passed if they got a 4xx."""

    pattern: str
    reason: str
    refused: bool = False

    def covers(self, name: str, message: str) -> bool:
        return re.search(self.pattern, name) is not None and (not self.refused or _is_refusal(message))


def _is_refusal(message: str) -> bool:
    """Whether a test failed because the server refused its request in the shape of the API."""
    return re.search(r"Error: Error code: 4\d\d - (?!\{(?!'type': 'error'))", message) is not None


def fetched(package: str, version: str, folder: Path) -> Path:
    """The unpacked source distribution of a package, whole or not there: several processes may fetch it at once."""
    root = folder / f"{package}-{version}"
    if not root.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            unpacked = _unpacked(package, version, Path(temporary))
            with suppress(OSError):  # another process was faster
                unpacked.rename(root)
    assert root.is_dir()
    return root


def _unpacked(package: str, version: str, folder: Path) -> Path:
    """The source distribution of a package, downloaded to the folder and unpacked there."""
    download(f"{package}=={version}", folder, "--no-binary", package)
    with tarfile.open(folder / f"{package}-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"{package}-{version}"


def fetched_wheel(package: str, version: str, platform: str, folder: Path) -> Path:
    """The wheel of a package for CPython 3.11 on a platform, to be read only; `folder` is this test's own."""
    target = ("--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11", "--platform", platform)
    download(f"{package}=={version}", folder, *target)
    return next(folder.glob(f"{package}-{version}-*.whl"))


def download(requirement: str, folder: Path, *options: str) -> None:
    """Download a distribution into a folder. Skips the test if the package index cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode and _UNREACHABLE.search(done.stderr):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def failures(
    root: Path, paths: Sequence[str], environment: Mapping[str, str], report: Path
) -> tuple[int, dict[str, str]]:
    """Run the tests: how many passed, and the messages of those that did not."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "--tb=native",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    variables = {**os.environ, **environment, "PYTHONPATH": ""}
    done = subprocess.run([*command, *paths], cwd=root, env=variables, capture_output=True, text=True, timeout=100)
    assert report.exists(), done.stdout + done.stderr
    messages, num_passed = {}, 0
    for case in ElementTree.parse(report).iter("testcase"):  # a report of our own making
        problems = [problem for kind in ("failure", "error") for problem in case.findall(kind)]
        name = f"{case.get('classname')}.{case.get('name')}"
        if problems:
            messages[name] = f"{problems[0].get('message')}\n{problems[0].text}"
        elif case.find("skipped") is None:
            num_passed += 1
    return num_passed, messages


def unlisted(messages: Mapping[str, str], exclusions: Sequence[Exclusion]) -> dict[str, str]:
    """The failures that no exclusion covers."""
    return {
        name: message
        for name, message in messages.items()
        if not any(exclusion.covers(name, message) for exclusion in exclusions)
    }


@contextmanager
def server(
    replies: Any,
    settings: ServingSettings,
    template: str | None = None,
    max_length: int = 1 << 14,
    wrap: Callable[[FastAPI], ASGIApp] = lambda api: api,
) -> Iterator[str]:
    """The address of a server whose model gives these replies."""
    with replying_engine(replies, template, max_length) as engine, running(wrap(app(engine, settings))) as uvicorn:
        yield f"http://127.0.0.1:{uvicorn.servers[0].sockets[0].getsockname()[1]}"

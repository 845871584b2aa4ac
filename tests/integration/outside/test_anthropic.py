"""The anthropic package's own tests of messages and models, against this server."""

from __future__ import annotations

import re
from pathlib import Path

import anthropic
import pytest
from anthropic.resources.messages import DEPRECATED_MODELS

from penstock.serving import ServingSettings
from tests.integration.outside.suites import Exclusion, failures, fetched, server, unlisted

PAGE = ("model_id", "after_id", "before_id")  # names that the tests of models use
PATHS = ("test_messages.py", "test_models.py")
EXCLUSIONS = (
    Exclusion(r"\[aiohttp\]$", "needs the optional package httpx_aiohttp, a transport of the client"),
    Exclusion("messages.*_with_all_params", "a tool with properties that are no schemas", refused=True),
)
# The suite's conftest imports two packages that only its tests of recorded answers need.
STAND_INS = """
import sys
from types import ModuleType


def pytest_addoption(parser):
    parser.addoption("--http-record", action="store_true")


for name in ("inline_snapshot", "http_snapshot", "http_snapshot.httpx"):
    sys.modules[name] = ModuleType(name)
sys.modules["inline_snapshot"].Snapshot = list
sys.modules["http_snapshot"].SnapshotSerializerOptions = dict
sys.modules["http_snapshot.httpx"].HttpxSyncSnapshotClient = dict
sys.modules["http_snapshot.httpx"].HttpxAsyncSnapshotClient = dict
"""


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Kept between runs."""
    return Path(request.config.cache.mkdir("outside"))  # type: ignore[union-attr]


def test_the_anthropic_packages_own_tests_pass(folder: Path, tmp_path: Path) -> None:
    root = fetched("anthropic", anthropic.__version__, folder)
    (root / "stand_ins.py").write_text(STAND_INS)
    names = set(re.findall(r'model="([^"]+)"', (root / "tests" / "api_resources" / PATHS[0]).read_text()))
    names |= {*PAGE, *DEPRECATED_MODELS}
    with server(["The water falls."], ServingSettings(served_model_name=tuple(sorted(names)))) as url:
        paths = ["-p", "stand_ins", *(f"tests/api_resources/{path}" for path in PATHS)]
        num_passed, messages = failures(root, paths, {"TEST_API_BASE_URL": url}, tmp_path / "report.xml")
    assert unlisted(messages, EXCLUSIONS) == {}
    assert num_passed >= 80

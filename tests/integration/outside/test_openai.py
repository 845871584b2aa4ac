"""The openai package's own tests of its resources, against this server."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from penstock.serving import ServingSettings
from tests.integration.outside.suites import Exclusion, failures, fetched, server, unlisted

NAMES = ("gpt-6-astra", "gpt-3.5-turbo-instruct", "text-embedding-3-small", "model")
SETTINGS = ServingSettings(served_model_name=NAMES)
PATHS = ("chat/test_completions.py", "test_completions.py", "test_embeddings.py", "test_models.py")
EXCLUSIONS = (
    Exclusion(r"\[aiohttp\]$", "needs the optional package httpx_aiohttp, a transport of the client"),
    Exclusion(
        r"chat\.test_completions\.\w+\.test_\w+_(retrieve|update|list|list_with_all_params|delete)\[",
        "chat completions are not stored: there is nothing to retrieve, update, list or delete",
    ),
    Exclusion(r"test_models\.\w+\.test_\w+_delete\[", "the served model cannot be deleted"),
    Exclusion(
        r"test_embeddings\.\w+\.test_(method|raw_response|streaming_response)_create\[strict\]$",
        "asks for base64 and, in its private strict mode, validates the answer as numbers before it decodes it",
    ),
    Exclusion("_with_all_params_", "values out of range, such as max_tokens=0 and best_of=0", refused=True),
)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Kept between runs."""
    return Path(request.config.cache.mkdir("outside"))  # type: ignore[union-attr]


def test_the_openai_packages_own_tests_pass(folder: Path, tmp_path: Path) -> None:
    root = fetched("openai", openai.__version__, folder)
    with server(["The water falls."], SETTINGS) as url:
        environment = {"TEST_API_BASE_URL": f"{url}/v1", "PYTHONPATH": ""}
        paths = [f"tests/api_resources/{path}" for path in PATHS]
        num_passed, messages = failures(root, ["-o", "addopts=", *paths], environment, tmp_path / "report.xml")
    assert unlisted(messages, EXCLUSIONS) == {}
    assert num_passed >= 80

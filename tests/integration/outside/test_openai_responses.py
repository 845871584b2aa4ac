"""The openai package's own tests of the Responses API, against this server."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from penstock.serving import ServingSettings
from tests.integration.outside.suites import Exclusion, failures, fetched, server, unlisted

SETTINGS = ServingSettings(served_model_name=("gpt-6-astra", "model"))
PATHS = ("test_responses.py", "responses/test_input_items.py", "responses/test_input_tokens.py")
STORED_IDS = ("resp_677efb5139a88190b512bc3fef8e535d", "response_id")
EXCLUSIONS = (
    Exclusion(r"\[aiohttp\]$", "needs the optional package httpx_aiohttp, a transport of the client"),
    Exclusion("_compact", "a conversation is not compacted by the server"),
    Exclusion("_retrieve_.*overload_2", "a stored response has no stream", refused=True),
    Exclusion("_with_all_params", "fields that are refused, such as background mode and limit=0", refused=True),
    Exclusion(r"_(create_overload_\d|count)\[", "neither an input nor anything else to answer", refused=True),
)


class Stored:
    """An app whose store has a response under the ids that the suite asks for, even after the suite deleted it."""

    def __init__(self, api: FastAPI) -> None:
        self._api = api
        self.response_id = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        responses = self._api.state.server.responses if self.response_id else None
        if responses is not None:
            for response_id in STORED_IDS:
                responses.put("", response_id, responses.get("", self.response_id))
        await self._api(scope, receive, send)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Kept between runs."""
    return Path(request.config.cache.mkdir("outside"))  # type: ignore[union-attr]


def test_the_openai_packages_own_tests_of_responses_pass(folder: Path, tmp_path: Path) -> None:
    root = fetched("openai", openai.__version__, folder)
    apps: list[Stored] = []

    def wrap(api: FastAPI) -> Stored:
        apps.append(Stored(api))
        return apps[0]

    with server(["The water falls."], SETTINGS, wrap=wrap) as url:
        apps[0].response_id = httpx.post(f"{url}/v1/responses", json={"input": "What falls?"}).json()["id"]
        paths = [f"tests/api_resources/{path}" for path in PATHS]
        environment = {"TEST_API_BASE_URL": f"{url}/v1"}
        num_passed, messages = failures(root, paths, environment, tmp_path / "report.xml")
    assert unlisted(messages, EXCLUSIONS) == {}
    assert num_passed >= 72

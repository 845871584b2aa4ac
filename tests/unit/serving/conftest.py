"""Fixtures of both chat APIs: an app around an engine that cuts its text anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.unit.serving.split_engine import SplitEngine, split_client


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[TestClient, SplitEngine]]:
    with split_client() as pair:
        yield pair


@pytest.fixture
def client(service: tuple[TestClient, SplitEngine]) -> TestClient:
    return service[0]


@pytest.fixture
def engine(service: tuple[TestClient, SplitEngine]) -> SplitEngine:
    engine = service[1]
    engine.chunks, engine.finish_reason, engine.stop_reason, engine.error = ["water ", "falls"], "stop", None, None
    return engine

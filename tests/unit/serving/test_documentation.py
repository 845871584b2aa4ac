"""`docs/serving.md` names every route, and its settings are valid."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from penstock import EngineConfig
from penstock.serving.application import ROUTES
from penstock.serving.process import ProcessSettings

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_route_is_named() -> None:
    assert [route.path for route in ROUTES if route.path.partition("/{")[0] not in DOCUMENT] == []


def test_the_file_of_settings_is_valid() -> None:
    block = re.search(r"```yaml\n(serving:.*?)```", DOCUMENT, re.DOTALL)
    assert block
    sections = yaml.safe_load(block[1])
    assert len(ProcessSettings(**sections["serving"]).api_keys) == 2
    assert EngineConfig(**sections["engine"]).kv_cache_tokens == 200_000

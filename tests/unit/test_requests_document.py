"""`docs/requests.md` names every field of a result, every finish reason, and every error with its status."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from penstock import CompletionOutput, Delta, EngineConfig, PenstockError, RequestOutput
from penstock.api.stats import EngineStats
from penstock.outputs import RequestMetrics
from penstock.sequence import FinishReason
from penstock.serving.process import ProcessSettings

DOCS = Path(__file__).resolve().parents[2] / "docs"
DOCUMENT = (DOCS / "requests.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("record", [RequestOutput, CompletionOutput, RequestMetrics, Delta])
def test_every_field_of_a_result_is_named(record: type) -> None:
    assert [field.name for field in dataclasses.fields(record) if f"`{field.name}`" not in DOCUMENT] == []


def test_every_finish_reason_is_explained() -> None:
    assert [reason for reason in FinishReason if f"\n| `{reason}` |" not in DOCUMENT] == []


def errors(base: type[PenstockError]) -> dict[str, int]:
    """The status of every public error below this one."""
    found: dict[str, int] = {}
    for error in base.__subclasses__():
        if error.__module__ == "penstock.errors":
            found |= errors(error) if error.__name__.startswith("_") else {error.__name__: error.http_status}
            found |= errors(error)
    return found


def test_every_error_is_named_with_its_status() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (\d+) \|", DOCUMENT, re.MULTILINE)
    assert {name: int(status) for name, status in rows} == errors(PenstockError)


def test_the_default_length_is_the_one_that_is_named() -> None:
    assert f"**It is {EngineConfig().max_sequence_length} by default**" in DOCUMENT


def test_the_counts_that_are_named_exist() -> None:
    named = re.findall(r'^\| `\["(\w+)"\]', DOCUMENT, re.MULTILINE)
    assert named
    assert set(named) <= get_type_hints(EngineStats).keys()


def test_every_setting_of_the_server_is_named() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    assert [name for name in ProcessSettings.model_fields if f"\n| `{name}` |" not in text] == []

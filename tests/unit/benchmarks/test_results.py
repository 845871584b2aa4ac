"""Measurements are written once each, and found again after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.results import Results


def rate(workload: str, run: int = 0, seconds: float = 1.0) -> dict[str, Any]:
    return {
        "model": "m",
        "run": run,
        "kind": "rate",
        "engine": "e",
        "workload": workload,
        "seconds": seconds,
    }


def test_what_was_appended_is_known_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    Results(path).append(rate("single"))
    again = Results(path)
    assert again.records == [rate("single")]
    assert again.has(rate("single", seconds=9.0))
    assert not again.has(rate("single", run=1))
    assert not again.has(rate("prefill"))


def test_first_measurement_of_two_counts(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.append(rate("single", seconds=1.0))
    results.merge([rate("single", seconds=2.0), rate("prefill")])
    assert results.records == [rate("single", seconds=1.0), rate("prefill")]


def test_merged_measurements_are_not_written(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.merge([rate("single")])
    assert not results.path.exists()


def test_line_that_was_torn_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(rate("single")) + '\n{"model": "m", "sitt')
    results = Results(path)
    assert results.records == [rate("single")]
    results.append(rate("prefill"))
    assert Results(path).records == [rate("single"), rate("prefill")]


def test_records_are_chosen_by_model_and_kind(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.merge([rate("single"), rate("single") | {"model": "other"}, rate("single") | {"kind": "load"}])
    assert results.of("m", "rate") == [rate("single")]

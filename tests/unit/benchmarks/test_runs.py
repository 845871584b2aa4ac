"""Runs with runners of a few lines: what is measured, what is resumed, which engines are left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from harness.compared_engines import ComparedEngine
from harness.processes import ProcessFailed, record, records_of
from harness.results import Results
from harness.runs import Plan, measure_runs

RUNNER = """
import json, sys
print("chatter"); print("{ not json")
print(json.dumps({"kind": "load", "load_s": 1.0}))
for name in sys.argv[3].split(","):
    if name == "bad":
        sys.exit("no such thing")
    print(json.dumps({"kind": "rate", "workload": name, "requests": 1}), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runner.py").write_text(RUNNER)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def results(folder: Path) -> Results:
    """Two runs in which the machine was already measured."""
    results = Results(folder / "results.jsonl")
    for run in range(2):
        results.append({"model": "m", "run": run, "kind": "machine"})
    return results


def plan(folder: Path, *workloads: str, runs: int = 2) -> Plan:
    return Plan(folder, "m", workloads, runs, repeats=1, timeout_s=30)


def engine(folder: Path, name: str) -> ComparedEngine:
    return ComparedEngine(name, sys.executable, str(folder / "runner.py"), "bf16")


def rates(results: Results) -> list[tuple[int, str, str]]:
    return [(rate["run"], rate["engine"], rate["workload"]) for rate in results.of("m", "rate")]


def test_every_engine_is_measured_in_every_run(folder: Path, results: Results) -> None:
    measure_runs(plan(folder, "single"), [engine(folder, "a"), engine(folder, "b")], results)
    assert rates(results) == [(0, "a", "single"), (0, "b", "single"), (1, "b", "single"), (1, "a", "single")]


def test_interrupted_run_resumes_where_it_stopped(folder: Path, results: Results) -> None:
    measure_runs(plan(folder, "single", runs=1), [engine(folder, "a")], results)
    again = Results(results.path)
    measure_runs(plan(folder, "single", "prefill", runs=1), [engine(folder, "a")], again)
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert [line["workload"] for line in lines if line["kind"] == "rate"] == ["single", "prefill"]


def test_failing_engine_keeps_its_results_and_is_left_out(
    folder: Path, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_runs(plan(folder, "single", "bad"), [engine(folder, "a")], results)
    assert rates(results) == [(0, "a", "single")]
    assert "a failed and is left out from here on" in capsys.readouterr().err


def test_absent_engine_is_skipped_with_a_line(
    folder: Path, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_runs(plan(folder, "single"), [ComparedEngine("a", "/nowhere/python", "x.py", "bf16")], results)
    assert rates(results) == []
    assert "skipping a: there is no /nowhere/python" in capsys.readouterr().err


def test_failed_process_reports_the_end_of_its_stderr() -> None:
    command = [sys.executable, "-c", "import sys; print('{}'); sys.exit('out of luck')"]
    with pytest.raises(ProcessFailed, match="out of luck"):
        list(records_of(command, {}))


def test_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ProcessFailed):
        list(records_of([sys.executable, "-c", "input() if 0 else __import__('threading').Event().wait()"], {}, 0.2))


def test_only_objects_are_records() -> None:
    assert record('{"a": 1}\n') == {"a": 1}
    assert [record(line) for line in ("INFO x", "{torn", "[1]", "")] == [None] * 4

"""Sittings with runners of a few lines: what is measured, what is resumed, who is left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from harness.entrants import Entrant
from harness.processes import ProcessFailed, record, records_of
from harness.results import Results
from harness.sittings import Plan, hold

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
    """Two sittings in which the machine was looked at already."""
    found = Results(folder / "results.jsonl")
    for sitting in range(2):
        found.append({"model": "m", "sitting": sitting, "kind": "machine"})
    return found


def plan(folder: Path, *workloads: str, sittings: int = 2) -> Plan:
    return Plan(folder, "m", workloads, sittings, repeats=1, timeout_s=30)


def entrant(folder: Path, name: str) -> Entrant:
    return Entrant(name, sys.executable, str(folder / "runner.py"), "bf16")


def rates(results: Results) -> list[tuple[int, str, str]]:
    return [(found["sitting"], found["engine"], found["workload"]) for found in results.of("m", "rate")]


def test_every_engine_runs_in_every_sitting(folder: Path, results: Results) -> None:
    hold(plan(folder, "single"), [entrant(folder, "a"), entrant(folder, "b")], results)
    assert rates(results) == [(0, "a", "single"), (0, "b", "single"), (1, "b", "single"), (1, "a", "single")]


def test_cut_off_run_goes_on_where_it_stopped(folder: Path, results: Results) -> None:
    hold(plan(folder, "single", sittings=1), [entrant(folder, "a")], results)
    again = Results(results.path)
    hold(plan(folder, "single", "prefill", sittings=1), [entrant(folder, "a")], again)
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert [line["workload"] for line in lines if line["kind"] == "rate"] == ["single", "prefill"]


def test_failing_engine_keeps_what_it_did_and_is_left_out(
    folder: Path, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(plan(folder, "single", "bad"), [entrant(folder, "a")], results)
    assert rates(results) == [(0, "a", "single")]
    assert "a failed and is left out from here on" in capsys.readouterr().err


def test_absent_engine_is_skipped_with_a_line(
    folder: Path, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(plan(folder, "single"), [Entrant("a", "/nowhere/python", "x.py", "bf16")], results)
    assert rates(results) == []
    assert "skipping a: there is no /nowhere/python" in capsys.readouterr().err


def test_failed_process_tells_the_end_of_its_errors() -> None:
    command = [sys.executable, "-c", "import sys; print('{}'); sys.exit('out of luck')"]
    with pytest.raises(ProcessFailed, match="out of luck"):
        list(records_of(command, {}))


def test_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ProcessFailed):
        list(records_of([sys.executable, "-c", "input() if 0 else __import__('threading').Event().wait()"], {}, 0.2))


def test_only_objects_are_records() -> None:
    assert record('{"a": 1}\n') == {"a": 1}
    assert [record(line) for line in ("INFO x", "{torn", "[1]", "")] == [None] * 4

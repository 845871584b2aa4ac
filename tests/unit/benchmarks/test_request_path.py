"""The path of a request stays short: the counts of `benchmarks/request_path.py` and their bounds."""

from __future__ import annotations

from typing import Any

import pytest

import request_path
from request_path import Call

# What is measured today; lower a bound whenever the path gets shorter, never raise one without a reason in the commit.
FIRST_DELTA = {"files": 43, "calls": 329, "thread_changes": 4}
STEADY_STEP = {"files": 22, "calls": 80}


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return request_path.summary(request_path.measure("scripted"))


@pytest.mark.parametrize("count", FIRST_DELTA)
def test_path_to_the_first_delta_stays_within_its_bounds(summary: dict[str, Any], count: str) -> None:
    assert summary["first_delta"][count] <= FIRST_DELTA[count]


@pytest.mark.parametrize("count", STEADY_STEP)
def test_steady_step_stays_within_its_bounds(summary: dict[str, Any], count: str) -> None:
    assert summary["steady_step"][count] <= STEADY_STEP[count]


def test_every_thread_is_seen(summary: dict[str, Any]) -> None:
    steady = summary["steady_step"]
    assert steady["engine"]["calls"] + steady["model"]["calls"] == steady["calls"]
    assert min(steady[thread]["calls"] for thread in ("engine", "model", "caller")) > 0


def test_turn_that_only_reports_a_start_is_no_change_of_thread() -> None:
    caller, engine, begun = (Call(thread, "file.py", "function") for thread in ("caller", "engine", "model"))
    forward = Call("model", "", "forward pass")
    assert request_path.thread_changes([caller, engine, begun, engine, forward, begun, engine, caller]) == 4
    assert request_path.counts([caller, engine, begun, forward]) == {"files": 1, "calls": 3}

"""The runs of a comparison: every engine once per run, in rotating order, one at a time, each in its own process.

Owns the order of measurements; what the results file contains is not measured again. Missing and failing engines are
left out with a note. Called by `compare` and `scaling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from harness.compared_engines import ComparedEngine
from harness.console import note, progress
from harness.footprint import footprint
from harness.processes import ProcessFailed, fresh, records_of
from harness.results import Record, Results


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: the model's folder and its name in the results, the workloads, and how often."""

    folder: Path
    model: str
    workloads: tuple[str, ...]
    num_runs: int
    repeats: int
    timeout_s: float


def rotated(engines: Sequence[ComparedEngine], run: int) -> list[ComparedEngine]:
    """The engines in the order of a run: each run starts with another one."""
    start = run % len(engines) if engines else 0
    return [*engines[start:], *engines[:start]]


def available(engines: Sequence[ComparedEngine]) -> list[ComparedEngine]:
    """The engines that are installed; notes the others."""
    for engine in engines:
        if reason := engine.missing():
            note(f"skipping {engine.name}: {reason}")
    return [engine for engine in engines if engine.missing() is None]


def measure_runs(plan: Plan, engines: Sequence[ComparedEngine], results: Results) -> None:
    """Measure what the results lack. A failing engine is left out of later runs."""
    installed, num_rates = available(engines), len(results.of(plan.model, "rate"))
    failed: set[str] = set()
    record_footprint(plan, results)
    with progress(plan.num_runs * len(installed)) as step:
        for run in range(plan.num_runs):
            measure_machine(plan, run, results)
            for engine in rotated(installed, run):
                step(f"run {run + 1}, {engine.name}")
                if engine.name not in failed and not measure_engine(plan, engine, run, results):
                    failed.add(engine.name)
    if len(results.of(plan.model, "rate")) == num_rates:
        note(f"{results.path} already has all of this: use another --results file to measure again, or more --runs")


def measure_machine(plan: Plan, run: int, results: Results) -> None:
    """Record the facts and limits of the machine in this run."""
    if not results.has({"model": plan.model, "run": run, "kind": "machine"}):
        results.append(stamped(fresh("harness.roofline"), plan, run))


def record_footprint(plan: Plan, results: Results) -> None:
    """Record the model's footprint, so that a report can be written without the model."""
    is_recorded = results.has({"model": plan.model, "kind": "footprint"})
    if not is_recorded and (shape := footprint(plan.folder)):
        results.append({"model": plan.model, "kind": "footprint", "shape": asdict(shape)})


def measure_engine(plan: Plan, engine: ComparedEngine, run: int, results: Results) -> bool:
    """Measure the workloads that one engine lacks; False if it failed."""
    workloads = [name for name in plan.workloads if not results.has(rate_key(plan, engine, run, name))]
    if not workloads:
        return True
    command = engine.command(str(plan.folder), workloads, plan.repeats)
    try:
        for record in records_of(command, engine.environment(), plan.timeout_s):
            identity = {"engine": engine.name, "precision": engine.precision, "own": engine.is_ours}
            results.append(stamped(identity | record, plan, run))
    except ProcessFailed as error:
        note(f"{engine.name} failed and is left out from here on: {error}")
        return False
    return True


def rate_key(plan: Plan, engine: ComparedEngine, run: int, workload: str) -> Record:
    """The fields that identify one measurement."""
    return {"model": plan.model, "run": run, "kind": "rate", "engine": engine.name, "workload": workload}


def stamped(record: Record, plan: Plan, run: int) -> Record:
    """The record with its model, run and time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"model": plan.model, "run": run, "time": now, **record}

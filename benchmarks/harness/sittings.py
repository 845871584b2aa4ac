"""Sittings: every entrant once per sitting, in an order that rotates, each in a process of its own, one at a time.

Owns what is measured next; what the results file has already is not measured again. Absent and failing entrants are
left out with a line. Called by `compare` and `scaling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from harness.console import note, progress
from harness.entrants import Entrant
from harness.footprint import footprint
from harness.processes import ProcessFailed, fresh, records_of
from harness.results import Record, Results


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: on a model (a folder, and what results call it), so often."""

    folder: Path
    model: str
    workloads: tuple[str, ...]
    sittings: int
    repeats: int
    timeout_s: float


def rotated(entrants: Sequence[Entrant], sitting: int) -> list[Entrant]:
    """Somebody else begins in every sitting."""
    first = sitting % len(entrants) if entrants else 0
    return [*entrants[first:], *entrants[:first]]


def present(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Those that are there; a line for each other one."""
    for entrant in entrants:
        if reason := entrant.missing():
            note(f"skipping {entrant.name}: {reason}")
    return [entrant for entrant in entrants if entrant.missing() is None]


def hold(plan: Plan, entrants: Sequence[Entrant], results: Results) -> None:
    """Measure whatever is not measured yet. A failing entrant is not tried again in later sittings."""
    able, before = present(entrants), len(results.of(plan.model, "rate"))
    failed: set[str] = set()
    look_at_model(plan, results)
    with progress(plan.sittings * len(able)) as step:
        for sitting in range(plan.sittings):
            look_at_machine(plan, sitting, results)
            for entrant in rotated(able, sitting):
                step(f"sitting {sitting + 1}, {entrant.name}")
                if entrant.name not in failed and not sit(plan, entrant, sitting, results):
                    failed.add(entrant.name)
    if len(results.of(plan.model, "rate")) == before:
        note(f"{results.path} has all of this: name another --results file to measure anew, or ask for more sittings")


def look_at_machine(plan: Plan, sitting: int, results: Results) -> None:
    """What the machine is and can do, in the same sitting."""
    if not results.has({"model": plan.model, "sitting": sitting, "kind": "machine"}):
        results.append(stamped(fresh("harness.roofline"), plan, sitting))


def look_at_model(plan: Plan, results: Results) -> None:
    """What the model cannot do without, so that a report can be made where the model is not."""
    known = results.has({"model": plan.model, "kind": "footprint"})
    if not known and (shape := footprint(plan.folder)):
        results.append({"model": plan.model, "kind": "footprint", "shape": asdict(shape)})


def sit(plan: Plan, entrant: Entrant, sitting: int, results: Results) -> bool:
    """One entrant's missing workloads; False when it failed."""
    wanted = [name for name in plan.workloads if not results.has(sought(plan, entrant, sitting, name))]
    if not wanted:
        return True
    command = entrant.command(str(plan.folder), wanted, plan.repeats)
    try:
        for record in records_of(command, entrant.environment(), plan.timeout_s):
            named = {"engine": entrant.name, "precision": entrant.precision, "own": entrant.own}
            results.append(stamped(named | record, plan, sitting))
    except ProcessFailed as error:
        note(f"{entrant.name} failed and is left out from here on: {error}")
        return False
    return True


def sought(plan: Plan, entrant: Entrant, sitting: int, workload: str) -> Record:
    """The measurement that would answer."""
    what = {"kind": "rate", "engine": entrant.name, "workload": workload}
    return {"model": plan.model, "sitting": sitting, **what}


def stamped(record: Record, plan: Plan, sitting: int) -> Record:
    """With what it belongs to, and when it was taken."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"model": plan.model, "sitting": sitting, "time": now, **record}

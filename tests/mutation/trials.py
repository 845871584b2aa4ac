"""`Trials`: runs the tests against each mutant, nearest tests first, and records the verdicts.

Owns the results and the list of mutants known to be equivalent. Lets `Forks` run the tests.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.mutation.forks import Run, Task
from tests.mutation.operators import Mutant

FOLDER = Path(".mutation")
EQUIVALENT = Path("tests/mutation/equivalent.toml")
# Tests outside a package's unit tests that cover it, in the order in which they run.
WIDER: Mapping[str, Sequence[str]] = {
    "scheduling": (
        "tests/property/test_scheduler_machine.py",
        "tests/property/test_packing_machine.py",
        "tests/property/test_batcher_machine.py",
        "tests/unit/engine",
        "tests/integration/test_batching.py",
        "tests/stress/test_deadlines.py",
    ),
    "cache": (
        "tests/unit/scheduling",
        "tests/property/test_scheduler_machine.py",
        "tests/integration/test_memory.py",
        "tests/equivalence/test_host_tier.py",
    ),
    "engine": (
        "tests/property/test_text_machine.py",
        "tests/integration/test_batching.py",
        "tests/integration/test_errors.py",
        "tests/integration/test_handbook.py",
        "tests/integration/test_lessons.py",
        "tests/integration/test_forking.py",
        "tests/integration/test_memory.py",
        "tests/integration/test_optimizer.py",
        "tests/integration/test_embedding.py",
        "tests/equivalence/test_engine.py",
        "tests/stress/test_cancellation.py",
        "tests/stress/test_isolation.py",
        "tests/stress/test_shutdown.py",
    ),
    "optimizers": ("tests/unit/engine/loop/test_speculator.py", "tests/equivalence/test_speculation.py"),
    "models": ("tests/integration/test_handbook.py", "tests/equivalence/test_beams.py"),
}


class Verdict(StrEnum):
    """The outcome for a mutant."""

    KILLED = "killed"
    LIVES = "lives"
    EQUIVALENT = "equivalent"


class Runner(Protocol):
    """What `Trials` needs of `Forks`."""

    @property
    def is_full(self) -> bool: ...
    @property
    def is_idle(self) -> bool: ...
    def start(self, task: Task, on_end: Callable[[Run], None]) -> None: ...
    def wait(self) -> None: ...


class Stage(NamedTuple):
    """Tests to run together; `package` are those of the whole package, whose time is measured once."""

    tests: tuple[str, ...]
    package: tuple[str, ...]


def stages(file: str, root: Path = Path()) -> list[Stage]:
    """The tests to run for a mutant of this file, nearest first: its module's, its package's, wider ones."""
    parts = Path(file).with_suffix("").parts[1:]
    module, folder = f"penstock.{'.'.join(parts)}", root / Path("tests/unit", *parts[:-1])
    package, nearest = list[str](), list[str]()
    for path in sorted(folder.glob("test_*.py")):
        package.append(name := path.relative_to(root).as_posix())
        if path.stem == f"test_{parts[-1]}" or f"from {module} import" in path.read_text():
            nearest.append(name)
    other_tests = tuple(name for name in package if name not in nearest)
    wider = tuple(WIDER.get(parts[0], ()))
    near_stages = [Stage(tuple(nearest), tuple(package)), Stage(other_tests, tuple(package))]
    return [*(stage for stage in near_stages if stage.tests), Stage(wider, wider)]


class Trials:
    """The trials of all `mutants`; with `again`, survivors are tried once more."""

    def __init__(
        self,
        forks: Runner,
        mutants: Sequence[Mutant],
        *,
        again: bool = False,
        folder: Path = FOLDER,
        equivalent: Path = EQUIVALENT,
    ) -> None:
        self._forks = forks
        self._mutants = mutants
        self._results = Results(folder / "results.json")
        self._again = again
        self._unnoticed: list[Mutant] = []
        self._limits_s: dict[tuple[str, ...], float] = {}  # by `Stage.package`
        self._equivalent = {entry["mutant"] for entry in tomllib.loads(equivalent.read_text())["equivalent"]}

    def having(self, verdict: Verdict) -> list[Mutant]:
        """The mutants with this verdict."""
        return [mutant for mutant in self._mutants if self._verdict(mutant) is verdict]

    @property
    def share_killed(self) -> float:
        """The fraction of killed mutants among those that ran and are not equivalent."""
        killed, lives = len(self.having(Verdict.KILLED)), len(self.having(Verdict.LIVES))
        return killed / max(1, killed + lives)

    def run(self) -> None:
        """Run until each mutant has a verdict. Slow wider tests run last, for mutants that unit tests missed."""
        self._run_each([(mutant, stages(mutant.file)) for mutant in self._mutants if self._is_open(mutant)])
        self._run_each([(mutant, stages(mutant.file)[-1:]) for mutant in self._unnoticed])

    def _run_each(self, trials: Sequence[tuple[Mutant, list[Stage]]]) -> None:
        for mutant, remaining in trials:
            while self._forks.is_full:
                self._forks.wait()
            self._try(mutant, remaining)
        while not self._forks.is_idle:
            self._forks.wait()

    def _verdict(self, mutant: Mutant) -> Verdict | None:
        return Verdict.EQUIVALENT if mutant.id in self._equivalent else self._results.of(mutant)

    def _is_open(self, mutant: Mutant) -> bool:
        verdict = self._verdict(mutant)
        return verdict is None or (self._again and verdict is Verdict.LIVES)

    def _try(self, mutant: Mutant, remaining: list[Stage], *, once_more: bool = False) -> None:
        if not remaining:
            self._judge(mutant, Verdict.LIVES, "")
            return
        tests, package = remaining[0]
        if package in self._limits_s:
            module = ".".join(Path(mutant.file).with_suffix("").parts)
            task = Task(tests, self._limits_s[package], module, mutant.source)
            self._forks.start(task, partial(self._tried, mutant, remaining, once_more))
        else:
            self._forks.start(Task(package, 1200), partial(self._measured, mutant, remaining, once_more))

    def _measured(self, mutant: Mutant, remaining: list[Stage], once_more: bool, session: Run) -> None:
        """Record how long tests take without a mutant. They must pass, on the second attempt at the latest."""
        if session.passed:
            self._limits_s[remaining[0].package] = 20 + 4 * session.seconds
        elif once_more:
            sys.exit(f"without a mutant, {session.failure} fails")
        self._try(mutant, remaining, once_more=not session.passed)

    def _tried(self, mutant: Mutant, remaining: list[Stage], once_more: bool, session: Run) -> None:
        """Some wider tests depend on timing: a failure there has to occur twice."""
        if session.passed and len(remaining) == 2:
            self._unnoticed.append(mutant)
            print(f"unnoticed by unit tests: {mutant.file}:{mutant.line} {mutant.id.partition(':')[2]}", flush=True)
        elif session.passed:
            self._try(mutant, remaining[1:])
        elif once_more or len(remaining) > 1:
            self._judge(mutant, Verdict.KILLED, session.failure)
        else:
            self._try(mutant, remaining, once_more=True)

    def _judge(self, mutant: Mutant, verdict: Verdict, failure: str) -> None:
        self._results.put(mutant, verdict, failure)
        print(f"{verdict:7} {mutant.file}:{mutant.line} {mutant.id.partition(':')[2]}  {failure}", flush=True)


class Results:
    """Verdicts in a file, by the text of the mutant's file and the mutant's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._verdicts = self._read()

    def of(self, mutant: Mutant) -> Verdict | None:
        """The verdict on a mutant; None if its file, or the mutant, is new."""
        entry = self._verdicts.get(_key(mutant))
        return Verdict(entry[0]) if entry else None

    def put(self, mutant: Mutant, verdict: Verdict, failure: str) -> None:
        """Store a verdict and the test that failed."""
        self._verdicts = self._read() | {_key(mutant): [verdict, failure]}  # another run may have written in between
        partial_path = self._path.with_suffix(".new")
        partial_path.write_text(json.dumps(self._verdicts, indent=0))
        partial_path.replace(self._path)

    def _read(self) -> dict[str, list[str]]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}


def _key(mutant: Mutant) -> str:
    return f"{blake2b(mutant.original.encode(), digest_size=8).hexdigest()} {mutant.id}"

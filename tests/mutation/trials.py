"""`Trials`: mutants before their judges, which are the tests, nearest first; and what came of it.

Owns the results, and the list of mutants that somebody judged equivalent. Asks `Forks` to run tests.
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
# What looks at a package from further away, in the order in which it is asked.
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
    """What became of a mutant."""

    KILLED = "killed"
    LIVES = "lives"
    EQUIVALENT = "equivalent"


class Runner(Protocol):
    """What `Forks` is to us."""

    @property
    def is_full(self) -> bool: ...
    @property
    def is_idle(self) -> bool: ...
    def start(self, task: Task, done: Callable[[Run], None]) -> None: ...
    def wait(self) -> None: ...


class Stage(NamedTuple):
    """Tests to run together; `whole` are those of all modules of the package, whose time is measured once."""

    tests: tuple[str, ...]
    whole: tuple[str, ...]


def stages(file: str, root: Path = Path()) -> list[Stage]:
    """The tests to run for a mutant of this file, nearest first: its module's, its package's, wider ones."""
    parts = Path(file).with_suffix("").parts[1:]
    module, folder = f"penstock.{'.'.join(parts)}", root / Path("tests/unit", *parts[:-1])
    whole, nearest = list[str](), list[str]()
    for path in sorted(folder.glob("test_*.py")):
        whole.append(name := path.relative_to(root).as_posix())
        if path.stem == f"test_{parts[-1]}" or f"from {module} import" in path.read_text():
            nearest.append(name)
    others = tuple(name for name in whole if name not in nearest)
    wider = tuple(WIDER.get(parts[0], ()))
    found = [Stage(tuple(nearest), tuple(whole)), Stage(others, tuple(whole))]
    return [*(stage for stage in found if stage.tests), Stage(wider, wider)]


class Trials:
    """Of all `mutants`; with `again`, those that lived are run once more."""

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
        self._limits_s: dict[tuple[str, ...], float] = {}  # by `Stage.whole`
        self._equivalent = {entry["mutant"] for entry in tomllib.loads(equivalent.read_text())["equivalent"]}

    def having(self, verdict: Verdict) -> list[Mutant]:
        """The mutants that this became of."""
        return [mutant for mutant in self._mutants if self._verdict(mutant) is verdict]

    @property
    def share_killed(self) -> float:
        """Of those that ran and are not equivalent."""
        killed, lives = len(self.having(Verdict.KILLED)), len(self.having(Verdict.LIVES))
        return killed / max(1, killed + lives)

    def run(self) -> None:
        """Until each has a verdict. Wider tests take long: they come last, for those that unit tests did not notice."""
        self._run_each([(mutant, stages(mutant.file)) for mutant in self._mutants if self._is_open(mutant)])
        self._run_each([(mutant, stages(mutant.file)[-1:]) for mutant in self._unnoticed])

    def _run_each(self, trials: Sequence[tuple[Mutant, list[Stage]]]) -> None:
        for mutant, left in trials:
            while self._forks.is_full:
                self._forks.wait()
            self._try(mutant, left)
        while not self._forks.is_idle:
            self._forks.wait()

    def _verdict(self, mutant: Mutant) -> Verdict | None:
        return Verdict.EQUIVALENT if mutant.id in self._equivalent else self._results.of(mutant)

    def _is_open(self, mutant: Mutant) -> bool:
        verdict = self._verdict(mutant)
        return verdict is None or (self._again and verdict is Verdict.LIVES)

    def _try(self, mutant: Mutant, left: list[Stage], *, once_more: bool = False) -> None:
        if not left:
            self._judge(mutant, Verdict.LIVES, "")
            return
        tests, whole = left[0]
        if whole in self._limits_s:
            module = ".".join(Path(mutant.file).with_suffix("").parts)
            task = Task(tests, self._limits_s[whole], module, mutant.source)
            self._forks.start(task, partial(self._tried, mutant, left, once_more))
        else:
            self._forks.start(Task(whole, 1200), partial(self._measured, mutant, left, once_more))

    def _measured(self, mutant: Mutant, left: list[Stage], once_more: bool, run: Run) -> None:
        """How long tests take without a mutant. They must pass, at the second attempt at the latest."""
        if run.passed:
            self._limits_s[left[0].whole] = 20 + 4 * run.seconds
        elif once_more:
            sys.exit(f"without a mutant, {run.failure} fails")
        self._try(mutant, left, once_more=not run.passed)

    def _tried(self, mutant: Mutant, left: list[Stage], once_more: bool, run: Run) -> None:
        """Wider tests depend on time, some of them: what fails there has to fail twice."""
        if run.passed and len(left) == 2:
            self._unnoticed.append(mutant)
            print(f"unnoticed by unit tests: {mutant.file}:{mutant.line} {mutant.id.partition(':')[2]}", flush=True)
        elif run.passed:
            self._try(mutant, left[1:])
        elif once_more or len(left) > 1:
            self._judge(mutant, Verdict.KILLED, run.failure)
        else:
            self._try(mutant, left, once_more=True)

    def _judge(self, mutant: Mutant, verdict: Verdict, failure: str) -> None:
        self._results.put(mutant, verdict, failure)
        print(f"{verdict:7} {mutant.file}:{mutant.line} {mutant.id.partition(':')[2]}  {failure}", flush=True)


class Results:
    """Verdicts in a file, by the text of the mutant's file and the mutant's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()

    def of(self, mutant: Mutant) -> Verdict | None:
        """What is known of a mutant; None while its file, or the mutant, is new."""
        found = self._known.get(_key(mutant))
        return Verdict(found[0]) if found else None

    def put(self, mutant: Mutant, verdict: Verdict, failure: str) -> None:
        """Keep a verdict, and the test that failed."""
        self._known = self._read() | {_key(mutant): [verdict, failure]}  # another run may have written meanwhile
        partial_path = self._path.with_suffix(".new")
        partial_path.write_text(json.dumps(self._known, indent=0))
        partial_path.replace(self._path)

    def _read(self) -> dict[str, list[str]]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}


def _key(mutant: Mutant) -> str:
    return f"{blake2b(mutant.original.encode(), digest_size=8).hexdigest()} {mutant.id}"

"""Trials of mutants: which tests, in which order, and what is stored. No process is started."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation.choice import PACKAGES, Choice
from tests.mutation.forks import Import, Run, Task
from tests.mutation.operators import Mutant, mutants
from tests.mutation.trials import WIDER, Trials, Verdict, stages

SOURCE = "def f(a, b):\n    return a < b\n"


class Judges:
    """Runs each task at once: `judge` says which test fails, "" for none."""

    is_full = False
    is_idle = True

    def __init__(self, judge: Callable[[Task], str]) -> None:
        self.judge = judge
        self.tasks: list[Task] = []

    def start(self, task: Task, done: Callable[[Run], None]) -> None:
        self.tasks.append(task)
        failure = self.judge(task)
        done(Run(not failure, failure, 1.0))

    def wait(self) -> None:
        raise AssertionError("nothing runs")


def is_near(task: Task) -> bool:
    """Whether these are unit tests."""
    return task.tests[0].startswith("tests/unit/cache")


@pytest.fixture
def sample(tmp_path: Path) -> list[Mutant]:
    """Three mutants of a module of the cache, and an empty list of those judged equivalent."""
    (tmp_path / "equivalent.toml").write_text("equivalent = []")
    return mutants("penstock/cache/tier.py", SOURCE)


def trials_of(judges: Judges, sample: list[Mutant], folder: Path, *, again: bool = False) -> Trials:
    trials = Trials(judges, sample, again=again, folder=folder, equivalent=folder / "equivalent.toml")
    trials.run()
    return trials


def test_nearest_tests_come_first_and_every_unit_test_of_the_package_once() -> None:
    nearest, others, wider = stages("penstock/cache/tier.py")
    assert nearest.tests == ("tests/unit/cache/test_tier.py",)
    assert "tests/unit/cache/test_manager.py" in others.tests
    assert not set(nearest.tests) & set(others.tests)
    assert set(nearest.tests) | set(others.tests) == set(nearest.package) == set(others.package)
    assert wider.tests == WIDER["cache"]


def test_tests_that_are_named_exist() -> None:
    assert [name for tests in WIDER.values() for name in tests if not Path(name).exists()] == []


def test_a_mutant_is_killed_by_the_first_test_that_fails_with_it(sample: list[Mutant], tmp_path: Path) -> None:
    judges = Judges(lambda task: "test_tier.py::test" if task.source else "")
    trials = trials_of(judges, sample, tmp_path)
    assert trials.having(Verdict.KILLED) == sample
    assert [task.module for task in judges.tasks] == ["", *3 * ["penstock.cache.tier"]], "timed once, then one each"
    assert [task.source for task in judges.tasks[1:]] == [mutant.source for mutant in sample]


def test_wider_tests_run_last_and_have_to_fail_twice(sample: list[Mutant], tmp_path: Path) -> None:
    failures = iter(["broken", "by chance"])
    judges = Judges(lambda task: "" if is_near(task) or not task.source else next(failures, ""))
    trials = trials_of(judges, sample[:2], tmp_path)
    assert (trials.having(Verdict.KILLED), trials.having(Verdict.LIVES)) == (sample[:1], sample[1:2])
    assert [is_near(task) for task in judges.tasks] == sorted((is_near(task) for task in judges.tasks), reverse=True)


def test_tests_that_fail_without_a_mutant_end_the_run(sample: list[Mutant], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="without a mutant, broken fails"):
        trials_of(Judges(lambda task: "broken"), sample, tmp_path)


def test_what_was_run_is_not_run_again_unless_it_lived(sample: list[Mutant], tmp_path: Path) -> None:
    trials_of(Judges(lambda task: "killed" if task.source == sample[0].source else ""), sample, tmp_path)
    resumed = Judges(lambda task: "")
    assert trials_of(resumed, sample, tmp_path).share_killed == pytest.approx(1 / 3)
    assert resumed.tasks == []
    again = Judges(lambda task: "killed" if task.source else "")
    assert trials_of(again, sample, tmp_path, again=True).having(Verdict.KILLED) == sample
    assert {task.source for task in again.tasks if task.source} == {mutant.source for mutant in sample[1:]}


def test_a_file_that_changed_is_looked_at_anew(sample: list[Mutant], tmp_path: Path) -> None:
    trials_of(Judges(lambda task: ""), sample, tmp_path)
    judges = Judges(lambda task: "")
    trials_of(judges, mutants("penstock/cache/tier.py", SOURCE + "# changed\n"), tmp_path)
    assert judges.tasks


def test_what_was_judged_equivalent_does_not_count(sample: list[Mutant], tmp_path: Path) -> None:
    (tmp_path / "equivalent.toml").write_text(f"[[equivalent]]\nmutant = '{sample[0].id}'\nreason = 'a is never b'\n")
    judges = Judges(lambda task: "killed" if task.source else "")
    trials = trials_of(judges, sample, tmp_path)
    assert trials.having(Verdict.EQUIVALENT) == sample[:1]
    assert sample[0].source not in [task.source for task in judges.tasks]
    assert trials.share_killed == 1.0


def test_a_larger_choice_begins_with_the_smaller_one_and_takes_of_every_package() -> None:
    sample, more = (Choice("0", ["cache", "sampler"], None, "").mutants(count) for count in (4, 8))
    assert more[:4] == sample
    assert ["cache" in mutant.file for mutant in more] == [True, False] * 4
    assert Choice("1", ["cache", "sampler"], None, "").mutants(4) != sample


def test_packages_name_files_that_exist() -> None:
    for patterns in PACKAGES.values():
        assert all(list(Path().glob(pattern)) for pattern in patterns)


def test_a_module_is_imported_from_the_mutants_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_module.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [Import("toy_module", "VALUE = 2\n"), *sys.meta_path])
    module = importlib.import_module("toy_module")
    monkeypatch.delitem(sys.modules, "toy_module")
    assert module.VALUE == 2
    assert module.__file__ == str(tmp_path / "toy_module.py")
    assert (tmp_path / "toy_module.py").read_text() == "VALUE = 1\n"

"""`Forks`: pytest in forked processes that need not import anything large, each with at most one mutant in place.

Owns the processes. The parent has imported what the package and its tests depend on, never the package itself, so that
a child imports it with the mutant's text for one of its modules. Nothing is written but what the tests write.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

MEMORY_BYTES = 8 << 30  # of addresses: a mutant that fills its memory fails
TEST_LIMIT_S = 45  # a test that takes longer hangs
OURS = ("penstock", "tests")
ALSO = ("hypothesis.strategies", "hypothesis.stateful", "transformers.models.llama", "transformers.models.gpt2")
_REWRITTEN = "ignore::pytest.PytestAssertRewriteWarning"  # plugins, imported long before pytest asks for them


@dataclass(frozen=True, slots=True)
class Run:
    """The result of one pytest session: whether all tests passed, the first failure, and its seconds."""

    passed: bool
    failure: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Task:
    """One session to run. `module`, if any, is imported with the text `source`."""

    tests: Sequence[str]
    limit_s: float
    module: str = ""
    source: str = ""


class Forks:
    """At most `jobs` processes at once, whose output goes to files in `folder`."""

    def __init__(self, jobs: int, folder: Path) -> None:
        self._jobs = jobs
        self._folder = folder
        self._children: dict[int, tuple[Task, float, Callable[[Run], None]]] = {}

    @property
    def is_full(self) -> bool:
        """Whether another task has to wait."""
        return len(self._children) >= self._jobs

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs."""
        return not self._children

    def start(self, task: Task, done: Callable[[Run], None]) -> None:
        """Run a task; `wait` calls `done` at its end."""
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _be_child(task, self._folder)
        self._children[pid] = task, time.monotonic(), done

    def wait(self) -> None:
        """Wait until a task has ended, or was killed for taking too long."""
        while True:
            for pid, (task, begin, done) in list(self._children.items()):
                seconds = time.monotonic() - begin
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended or seconds > task.limit_s:
                    self._end(pid, ended)
                    done(self._outcome(pid, status if ended else None, seconds))
                    return
            time.sleep(0.02)

    def close(self) -> None:
        """Kill running tasks."""
        for pid in list(self._children):
            self._end(pid, 0)

    def _end(self, pid: int, ended: int) -> None:
        del self._children[pid]
        with contextlib.suppress(ProcessLookupError):  # also what its tests have started
            os.killpg(pid, signal.SIGKILL)
        if not ended:
            os.waitpid(pid, 0)

    def _outcome(self, pid: int, status: int | None, seconds: float) -> Run:
        notes, output = self._folder / f"{pid}.json", self._folder / f"{pid}.txt"
        failure = json.loads(notes.read_text()) if notes.exists() else ""
        for path in (notes, output):
            path.unlink(missing_ok=True)
        if status is None:
            return Run(False, "time ran out", seconds)
        passed = os.WIFEXITED(status) and os.WEXITSTATUS(status) in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        )
        return Run(passed, "" if passed else failure or "the process ended", seconds)


def import_dependencies() -> None:
    """Import whatever the package and pytest would import in a child. A child tells the names: it may import more."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        for path in sorted(Path("penstock").rglob("*.py")):
            if path.name != "__main__.py":
                with contextlib.suppress(ImportError):
                    importlib.import_module(".".join(path.with_suffix("").parts))
        names = [name for name in sys.modules if name.partition(".")[0] not in OURS]
        os.write(writer, json.dumps(names).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        names = json.load(pipe)
    os.waitpid(pid, 0)
    for name in (*names, *ALSO):
        with contextlib.suppress(Exception):  # some can be imported only by others
            importlib.import_module(name)
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    gc.collect()
    gc.freeze()  # a child's collections leave the pages alone that it shares with us


# In the child.


def _be_child(task: Task, folder: Path) -> None:
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's is not for us
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        output = os.open(folder / f"{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        if task.module:
            sys.meta_path.insert(0, Import(task.module, task.source))
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-W", _REWRITTEN, "--import-mode=importlib"]
        status = pytest.main([*options, f"--timeout={TEST_LIMIT_S}", *task.tests], [_Notes(folder)])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(int(status))


class _Notes:
    """Records the first test that failed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{os.getpid()}.json"

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self._path.exists():
            self._path.write_text(json.dumps(report.nodeid))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self._path.exists():
            self._path.write_text(json.dumps(f"{report.nodeid} (collecting)"))


class Import(importlib.abc.MetaPathFinder):
    """Imports one module from a text instead of its file."""

    def __init__(self, module: str, source: str) -> None:
        self._module = module
        self._source = source

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """A spec for the module, with the file that it really has."""
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        loader = _TextLoader(name, spec.origin, self._source)
        return importlib.util.spec_from_file_location(
            name, spec.origin, loader=loader, submodule_search_locations=spec.submodule_search_locations
        )


class _TextLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self._source, self.path, "exec", dont_inherit=True)
        return code

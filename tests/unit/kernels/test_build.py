"""Compiling on first use: once for all processes, again when what is kept is broken, and never an exception."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.kernels.build import build, cache_folder
from penstock.kernels.native import available

PLAIN = ("-O0",)  # quick to compile, and good for every CPU
REAL = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), "")
OPEN = "import sys; from penstock.kernels.build import build; sys.exit(build(('-O0',)).library is None)"

needs_compiler = pytest.mark.skipif(not REAL, reason="no compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder that is not there yet, and a process that opened nothing."""
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(folder))
    monkeypatch.delenv("CC", raising=False)
    build.cache_clear()
    yield folder
    build.cache_clear()


def compiler(folder: Path, then: str) -> str:
    """A compiler that tells its version, and otherwise notes its call and does what `then` says."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\necho called >> {folder}/calls\n{then}\n')
    path.chmod(0o755)
    return str(path)


def another_process() -> subprocess.Popen[bytes]:
    """A process that builds and opens the library, and ends with 0 if it could."""
    return subprocess.Popen([sys.executable, "-c", OPEN], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def test_the_cache_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("PENSTOCK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/penstock")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/penstock")


@needs_compiler
def test_what_was_compiled_once_is_opened_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, f'exec {REAL} "$@"'))
    first = build(PLAIN)
    assert first.library is not None
    assert first.note == "compiled with cc for this CPU"
    build.cache_clear()
    assert build(PLAIN).library is not None
    assert calls(tmp_path) == 1
    assert len(list(cache.iterdir())) == 1


@needs_compiler
def test_another_target_is_another_library(cache: Path) -> None:
    assert build(PLAIN).library is not None
    assert build(("-O0", "-fno-inline")).library is not None
    assert len(list(cache.iterdir())) == 2


def test_without_a_compiler_there_are_no_kernels_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING, "penstock"):
        assert [available() for _ in range(3)] == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "kernels run in plain torch: no C compiler was found (install gcc or clang, or set CC)"
    ]


def test_a_compiler_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, "echo 'cc: out of coffee' >&2; exit 1"))
    with caplog.at_level(logging.WARNING, "penstock"):
        assert not available()
        assert not available()
    assert build().note == "the compiler failed: cc: out of coffee"
    assert len(caplog.records) == 1
    assert calls(tmp_path) == 1
    assert list(cache.iterdir()) == []


def test_a_compiler_that_cannot_start_is_no_reason_to_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_bytes(b"\0not a program")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert build().library is None
    assert build().note


@needs_compiler
def test_processes_that_compile_at_once_all_succeed_and_leave_one_file(cache: Path) -> None:
    processes = [another_process() for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"not a library at all"], ids=["empty", "text"])
def test_a_broken_file_in_the_cache_is_replaced(cache: Path, content: bytes) -> None:
    assert another_process().wait() == 0
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert build(PLAIN).library is not None
    assert path.stat().st_size > 10_000


@needs_compiler
def test_where_nothing_can_be_kept_the_kernels_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert build(PLAIN).library is not None
    assert (tmp_path / "file").read_bytes() == b""


@needs_compiler
def test_a_library_in_a_cache_that_cannot_be_written_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, f'exec {REAL} "$@"'))
    assert build(PLAIN).library is not None
    cache.chmod(0o555)
    build.cache_clear()
    assert build(PLAIN).library is not None
    assert calls(tmp_path) == 1
    cache.chmod(0o755)

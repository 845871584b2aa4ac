"""Compiling on first use: once for all processes, again when what is kept is broken, and never an exception."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.kernels.build import FLAGS, UNIT, build, cache_folder
from penstock.kernels.native import available

PLAIN = ("-O0",)  # quick to compile, and good for every CPU
REAL = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), "")
OPEN = "import sys; from penstock.kernels.build import build; sys.exit(build(('-O0',)).library is None)"

needs_compiler = pytest.mark.skipif(not REAL, reason="no compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder that is not there yet, and a process that opened nothing."""
    folder = tmp_path / "deep" / "cache"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
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
@pytest.mark.usefixtures("temporary")
def test_another_target_is_another_library(cache: Path) -> None:
    assert build(PLAIN).library is not None
    assert build(("-O0", "-fno-inline")).library is not None
    assert len(list(cache.iterdir())) == 2


@needs_compiler
@pytest.mark.usefixtures("temporary")
def test_a_change_of_any_file_of_the_unit_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Most of the code is in files that the compiled one includes."""
    copy = shutil.copytree(UNIT.parent, tmp_path / "cpu")
    monkeypatch.setattr("penstock.kernels.build.UNIT", copy / UNIT.name)
    for count, name in enumerate(["kernels.c", "norms.c", "vectors.h"], start=1):
        build.cache_clear()
        assert build(PLAIN).library is not None
        assert len(list(cache.iterdir())) == count
        (copy / name).write_text((copy / name).read_text() + "/* more */\n")


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
@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("content", [b"", b"not a library at all"], ids=["empty", "text"])
def test_a_broken_file_in_the_cache_is_replaced(cache: Path, content: bytes) -> None:
    assert another_process().wait() == 0
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert build(PLAIN).library is not None
    assert path.stat().st_size > 10_000


def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry among the users, as containers run programs."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "PENSTOCK_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path) -> Path:
    """The folder for temporary files; the compiler only copies what it made once."""
    copy = f'while [ "$1" != -o ]; do shift; done; cp {library} "$2"'
    monkeypatch.setenv("CC", compiler(tmp_path, copy))
    return tmp_path / "temporary"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled library."""
    folder = tmp_path_factory.mktemp("library")
    subprocess.run([REAL, *FLAGS, *PLAIN, str(UNIT), "-o", str(folder / "native.so"), "-lm"], check=True)
    return folder / "native.so"


def no_cache(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the cache folder away."""
    (tmp_path / "file").touch()
    if how == "no home":
        nobody(monkeypatch)
    elif how == "no such home":
        monkeypatch.setenv("PENSTOCK_CACHE_DIR", "~nobody-of-that-name/cache")
    elif how == "a file":
        monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "file"))
    elif how == "below a file":
        monkeypatch.delenv("PENSTOCK_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif how == "noexec":
        real, cache = os.statvfs, os.environ["PENSTOCK_CACHE_DIR"]
        flags = SimpleNamespace(f_flag=os.ST_NOEXEC)
        monkeypatch.setattr(os, "statvfs", lambda path: flags if str(path) == cache else real(path))
    elif how == "full":
        cc = Path(os.environ["CC"])
        full = f'case "$*" in *{os.environ["PENSTOCK_CACHE_DIR"]}*) echo "No space left on device" >&2; exit 1;; esac'
        cc.write_text(cc.read_text().replace("while", f"{full}\nwhile"))


@needs_compiler
@pytest.mark.parametrize("how", ["no home", "no such home", "a file", "below a file", "noexec", "full"])
def test_without_a_cache_the_kernels_lie_in_a_private_temporary_folder(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, temporary: Path
) -> None:
    """Without a home there were no kernels at all."""
    no_cache(how, tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING, "penstock"):
        for _ in range(2):
            build.cache_clear()
            assert build(PLAIN).library is not None
    (folder,) = temporary.iterdir()
    assert folder.name == f"penstock-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 1, "the second process finds what the first one compiled"
    assert [str(folder) in record.getMessage() for record in caplog.records] == [True, True]
    assert "PENSTOCK_CACHE_DIR can name a folder" in caplog.text


@needs_compiler
@pytest.mark.parametrize("trap", ["writable", "link"])
def test_a_temporary_folder_that_others_can_write_is_not_used(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    no_cache("no home", tmp_path, monkeypatch)
    shared = temporary / f"penstock-{os.getuid()}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        shared.symlink_to(tmp_path / "elsewhere")
    else:
        shared.mkdir()
        shared.chmod(0o777)
    assert build(PLAIN).library is not None
    assert list(shared.iterdir()) == []
    assert list(temporary.iterdir()) == [shared], "the folder of this process alone is gone"


def test_without_any_folder_there_are_no_kernels_and_one_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_cache("no home", tmp_path, monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setenv("CC", compiler(tmp_path, "exit 0"))
    with caplog.at_level(logging.WARNING, "penstock"):
        assert not available()
    (record,) = caplog.records
    assert "no folder can hold compiled kernels: this user has no home folder" in record.getMessage()


@needs_compiler
@pytest.mark.usefixtures("temporary")
def test_a_relative_cache_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of a bare name is looked for among those of the system."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", ".")
    assert build(PLAIN).library is not None
    assert len(list(tmp_path.glob("native-*.so"))) == 1


@needs_compiler
@pytest.mark.usefixtures("temporary")
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

"""Compiles the kernels in `cpu/` on first use with the system's compiler, into the user's cache folder, and loads them.

Owns the cache key (sources, compiler, CPU) and the one log line when there is no compiler; never raises. Called by
`native`. Processes that compile at the same time write files of their own, and the last rename wins. A broken file in
the cache is replaced. If the cache cannot be used, the library goes to a temporary folder of the user's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNIT = Path(__file__).parent / "cpu" / "kernels.c"  # the translation unit; it includes all other files of its folder
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-std=gnu11", "-w")
THIS_CPU = ("-march=native",)
TIMEOUT_S = 120

log = logging.getLogger("penstock")


@dataclass(frozen=True, slots=True)
class Build:
    """The library, or None and the reason why there is none."""

    library: ctypes.CDLL | None
    note: str


@functools.cache
def build(target: tuple[str, ...] = THIS_CPU) -> Build:
    """Load the library; compile it first if the cache has none for these sources, compiler, CPU and target.

    `target` are the compiler flags that choose the instruction set.
    """
    try:
        compiler = _compiler()
        return Build(_load(compiler, target), f"compiled with {Path(compiler).name} for this CPU")
    except (OSError, RuntimeError, subprocess.SubprocessError, _NoCompiler) as error:
        reason = _reason(error)
        log.warning("kernels run in plain torch: %s", reason)
        return Build(None, reason)


def cache_folder() -> Path | None:
    """The folder of compiled kernels: `PENSTOCK_CACHE_DIR`, else `XDG_CACHE_HOME`/penstock, else ~/.cache/penstock.

    None if that depends on a home folder which is unknown.
    """
    with contextlib.suppress(RuntimeError, OSError):  # no home; a current folder that was removed
        if base := os.environ.get("PENSTOCK_CACHE_DIR"):
            return Path(base).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "penstock"
    return None


class _NoCompiler(Exception):
    pass


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")):
        if path := shutil.which(name):
            return path
    raise _NoCompiler("no C compiler was found (install gcc or clang, or set CC)")


def _load(compiler: str, target: tuple[str, ...]) -> ctypes.CDLL:
    """Load from the first folder that can hold the library. Raises `OSError` with the reasons if none can."""
    name = f"native-{_key(compiler, target)}.so"
    reasons = [] if cache_folder() else ["this user has no home folder"]
    for folder in _folders():
        try:
            library = _load_from(folder, name, compiler, target)
        except OSError as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning(
                "compiled kernels are in %s, because %s; PENSTOCK_CACHE_DIR can name a folder that keeps them",
                folder,
                "; ".join(reasons),
            )
        return library
    raise OSError("no folder can hold compiled kernels: " + "; ".join(reasons))


def _load_from(folder: Path, name: str, compiler: str, target: tuple[str, ...]) -> ctypes.CDLL:
    path = folder / name
    if path.exists():
        with contextlib.suppress(OSError):  # broken: replaced below
            return ctypes.CDLL(str(path))
    folder.mkdir(parents=True, exist_ok=True)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError(f"{folder} is mounted noexec")
    _compile(compiler, target, path)
    return ctypes.CDLL(str(path))


def _folders() -> Iterator[Path]:
    """The cache, then temporary folders: one shared by this user's processes, one of this process alone."""
    if (cache := cache_folder()) is not None:
        yield cache
    with contextlib.suppress(OSError):  # no folder for temporary files
        shared = Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}"
        if _is_private(shared):
            yield shared
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def _is_private(folder: Path) -> bool:
    """Make the folder if it is missing; whether it is this user's and nobody else can write to it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _key(compiler: str, target: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT_S, check=True).stdout
    sources = (part for path in sorted(UNIT.parent.glob("*.[ch]")) for part in (path.name.encode(), path.read_bytes()))
    parts = (*sources, version, " ".join(FLAGS + target).encode(), _cpu())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    fields = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    facts = {line.split(":")[0].strip(): line for line in reversed(lines)}  # of the first processor
    return "\n".join(facts[name] for name in sorted(fields) if name in facts).encode() + platform.machine().encode()


def _compile(compiler: str, target: tuple[str, ...], path: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    environment = os.environ | {"TMPDIR": str(path.parent), "LC_ALL": "C"}
    os.close(handle)
    try:
        command = [compiler, *FLAGS, *target, str(UNIT), "-o", name, "-lm"]
        subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True, env=environment)
        os.chmod(name, 0o755)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, subprocess.CalledProcessError) and b"No space left" in error.stderr:
            raise OSError(f"{path.parent} is full") from error
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        message = error.stderr.decode(errors="replace").strip().splitlines()[:1]
        return f"the compiler failed: {' '.join(message)}"
    return str(error)

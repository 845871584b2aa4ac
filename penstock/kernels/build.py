"""Compiles `native.c` on first use with the system's compiler, into the user's cache folder, and opens the library.

Owns the cache key (source, compiler, CPU) and the one log line when there is no compiler; never raises. Called by
`native`; two processes that compile at once each write their own file, and the last rename wins. A broken file in the
cache is replaced; where the cache cannot be written, the library is compiled anew for each process.
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
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-shared", "-fPIC", "-pthread", "-std=gnu11", "-w")
THIS_CPU = ("-march=native",)
TIMEOUT_S = 120

log = logging.getLogger("penstock")


@dataclass(frozen=True, slots=True)
class Build:
    """The opened library, or None and the reason why there is none."""

    library: ctypes.CDLL | None
    note: str


@functools.cache
def build(target: tuple[str, ...] = THIS_CPU) -> Build:
    """Open the library, compiling it if this source, compiler, CPU and target have not met before.

    `target` are the compiler's flags that choose the instruction set.
    """
    try:
        compiler = _compiler()
        return Build(_open(compiler, target), f"compiled with {Path(compiler).name} for this CPU")
    except (OSError, RuntimeError, subprocess.SubprocessError, _NoCompiler) as error:
        reason = _reason(error)
        log.warning("kernels run in plain torch: %s", reason)
        return Build(None, reason)


def cache_folder() -> Path:
    """Where compiled kernels are kept: `PENSTOCK_CACHE_DIR`, else `XDG_CACHE_HOME`/penstock, else ~/.cache/penstock."""
    base = os.environ.get("PENSTOCK_CACHE_DIR")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"


class _NoCompiler(Exception):
    pass


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")):
        found = shutil.which(name)
        if found:
            return found
    raise _NoCompiler("no C compiler was found (install gcc or clang, or set CC)")


def _open(compiler: str, target: tuple[str, ...]) -> ctypes.CDLL:
    path = cache_folder() / f"native-{_key(compiler, target)}.so"
    if path.exists():
        with contextlib.suppress(OSError):  # broken: replaced below
            return ctypes.CDLL(str(path))
    if _writable(path.parent):
        _compile(compiler, target, path)
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        _compile(compiler, target, Path(folder) / path.name)
        return ctypes.CDLL(str(Path(folder) / path.name))


def _writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def _key(compiler: str, target: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT_S, check=True).stdout
    parts = (SOURCE.read_bytes(), version, " ".join(FLAGS + target).encode(), _cpu())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    found = {line.split(":")[0].strip(): line for line in reversed(lines) if line.split(":")[0].strip() in wanted}
    return "\n".join(found[name] for name in sorted(found)).encode() + platform.machine().encode()


def _compile(compiler: str, target: tuple[str, ...], path: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, *target, str(SOURCE), "-o", name, "-lm"]
        subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True)
        os.chmod(name, 0o755)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        last = error.stderr.decode(errors="replace").strip().splitlines()[:1]
        return f"the compiler failed: {' '.join(last)}"
    return str(error)

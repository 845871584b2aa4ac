"""Fresh processes that report in JSON lines: every figure that memory, imports or threads could spoil is taken in one.

Owns their environment and their end: none outlives its caller. Never reads what they mean.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
TAIL_LINES = 12


class ProcessFailed(Exception):
    """A process ended badly; the message has the end of what it wrote to stderr."""


def own_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for processes that import this project and these helpers."""
    paths = [str(BENCHMARKS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(changes or {})


def foreign_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for engines that have a virtual environment of their own: it must not see this one's packages."""
    mine = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in mine} | dict(changes or {})


def records_of(
    command: Sequence[str], environment: Mapping[str, str], timeout_s: float = 3600.0
) -> Iterator[dict[str, Any]]:
    """The JSON objects that a process prints, one per line, as they come; other lines are somebody's chatter.

    Raises `ProcessFailed` when it cannot start, ends with an error, or takes longer than `timeout_s`.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        except OSError as error:
            raise ProcessFailed(f"{command[0]} does not run: {error}") from None
        yield from _records(process, timeout_s)
        if process.returncode:
            errors.seek(0)
            tail = "\n".join(errors.read().splitlines()[-TAIL_LINES:])
            raise ProcessFailed(f"{' '.join(command[:2])} ended with {process.returncode}\n{tail}")


def _records(process: subprocess.Popen[str], timeout_s: float) -> Iterator[dict[str, Any]]:
    """What it prints; it has ended afterwards, also where the reader lost interest."""
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    with process:
        try:
            assert process.stdout is not None
            yield from filter(None, map(record, process.stdout))
            process.wait()
        finally:
            timer.cancel()
            process.kill()


def record(line: str) -> dict[str, Any] | None:
    """The JSON object in a line, if it is one."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def fresh(module: str, *args: str) -> dict[str, Any]:
    """The last JSON object that a module of ours prints, run as a program in a process of its own.

    Raises `ProcessFailed`.
    """
    found = list(records_of([sys.executable, "-m", module, *args], own_environment()))
    if not found:
        raise ProcessFailed(f"{module} printed nothing")
    return found[-1]

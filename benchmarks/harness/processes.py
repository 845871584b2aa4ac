"""Fresh processes that report JSON lines, for measurements that imports, memory or threads of this one would disturb.

Owns their environment and their end: no process outlives its caller. Never interprets their reports.
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
    """A process failed; the message has the end of its stderr."""


def own_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for processes that import this project and these helpers."""
    paths = [str(BENCHMARKS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(changes or {})


def foreign_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for engines in other virtual environments, which must not import packages of this one."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in hidden} | dict(changes or {})


def records_of(
    command: Sequence[str], environment: Mapping[str, str], timeout_s: float = 3600.0
) -> Iterator[dict[str, Any]]:
    """The JSON objects that a process prints, one per line, as they arrive; other lines are ignored.

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
    """The objects that it prints; the process has ended afterwards, even if the reader stops early."""
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
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def fresh(module: str, *args: str) -> dict[str, Any]:
    """The last JSON object printed by one of our modules, run as a program in a fresh process.

    Raises `ProcessFailed`.
    """
    records = list(records_of([sys.executable, "-m", module, *args], own_environment()))
    if not records:
        raise ProcessFailed(f"{module} printed nothing")
    return records[-1]

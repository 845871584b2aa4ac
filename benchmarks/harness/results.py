"""Measurements as JSON lines in a file, appended one by one, so that an interrupted comparison can resume.

A measurement is identified by model, run, engine and workload; of two with the same key the first one counts. Never
rewrites existing lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def key(record: Record) -> tuple[Any, ...]:
    """The fields that identify a measurement."""
    return tuple(record.get(name) for name in ("model", "run", "kind", "engine", "workload"))


class Results:
    """The measurements in a file, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self._keys: set[tuple[Any, ...]] = set()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._is_incomplete = bool(text) and not text.endswith("\n")
        self.merge(read_lines(text.splitlines()))

    def merge(self, records: Iterable[Record]) -> None:
        """Add measurements without writing them."""
        for record in records:
            if key(record) not in self._keys:
                self._keys.add(key(record))
                self.records.append(record)

    def has(self, record: Record) -> bool:
        """Whether this was already measured."""
        return key(record) in self._keys

    def append(self, record: Record) -> None:
        """Add a measurement and write it at once, on a new line after an incomplete one."""
        self.merge([record])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if self._is_incomplete else "") + json.dumps(record) + "\n")
        self._is_incomplete = False

    def of(self, model: str, kind: str) -> list[Record]:
        """All measurements of one kind on one model, in order."""
        return [record for record in self.records if (record.get("model"), record.get("kind")) == (model, kind)]


def read_lines(lines: Iterable[str]) -> Iterable[Record]:
    """The objects in lines of JSON; incomplete lines are skipped."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record

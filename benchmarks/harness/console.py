"""The output of a benchmark: progress and tables on stderr; the result, one line of JSON, last on stdout.

Measures nothing. Called by every benchmark.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 140  # of a table if stderr is not a terminal
Step = Callable[[str], None]


def note(text: str) -> None:
    """Print a line for the user."""
    print(text, file=sys.stderr, flush=True)


def finish(result: Any) -> None:
    """Print the result, the last line of the output."""
    sys.stderr.flush()
    print(json.dumps(result), flush=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; its first column names the rows."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(cell, row))
    Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH).print(table)


def cell(value: object) -> str:
    """A number with at least three significant digits; an empty string for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


@contextmanager
def progress(total: int) -> Iterator[Step]:
    """Yields a function to call before each of `total` tasks: a bar on a terminal, else a line per task."""
    numbers = count()
    if not sys.stderr.isatty():
        yield lambda text: note(f"[{next(numbers) + 1}/{total}] {text}")
        return
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text, completed=next(numbers))

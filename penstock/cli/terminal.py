"""Terminal output: notes on stderr, dimmed text, and a stdout that may be closed at any moment.

Never prints results; the commands do. Called by every command.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

DIM, RESET = "\x1b[2m", "\x1b[0m"
TABLE_WIDTH = 140  # if stderr is not a terminal


def open_standard_streams() -> None:
    """Open closed standard streams (`>&-`) on /dev/null: else files of the event loop would get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the process exits


def has_colors(stream: TextIO) -> bool:
    """Whether to write escape sequences: the stream is a terminal and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def dim(text: str, stream: TextIO) -> str:
    """`text`, dimmed where the stream can show that."""
    return f"{DIM}{text}{RESET}" if text and has_colors(stream) else text


def write(text: str) -> None:
    """Write text to stdout and flush. Raises `BrokenPipeError` if its reader is gone."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a line for the user on stderr."""
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def status_line(text: str) -> Iterator[None]:
    """Show a line with a spinner and the seconds so far on stderr, if that is a terminal, until the block ends."""
    if not has_colors(sys.stderr):
        yield
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("[dim]{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        progress.add_task(escape(text), total=None)
        yield


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar if stderr is a terminal; yields a function to call before each task."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, numbers = progress.add_task("", total=total), iter(range(total + 1))
        yield lambda text: progress.update(task, description=text, completed=next(numbers))


def print_table(table: object) -> None:
    """Print a rich table on stderr, without breaking its lines if that is not a terminal."""
    from rich.console import Console

    Console(stderr=True, width=None if sys.stderr.isatty() else TABLE_WIDTH).print(table)


def replace_unencodable() -> None:
    """Print a question mark for a character that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def abandon_stdout() -> None:
    """After a `BrokenPipeError`: redirect stdout, so that the interpreter's last flush does not fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

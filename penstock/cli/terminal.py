"""What a person sees: notes on stderr, dimmed text, and a stdout that may be closed at any moment.

Never prints results; those are the commands' own. Called by every command.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

DIM, PLAIN, ERASE_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


def fill_standard_streams() -> None:
    """Open what a caller closed (`>&-`) on nothing: else the event loop's own files would take those numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process


def has_colors(stream: TextIO) -> bool:
    """Whether escape sequences make sense there: a terminal, and nobody set NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def dim(text: str, stream: TextIO) -> str:
    """`text`, paler where the stream can show that."""
    return f"{DIM}{text}{PLAIN}" if text and has_colors(stream) else text


def write(text: str) -> None:
    """Text to stdout, at once. Raises `BrokenPipeError` when nobody reads it any more."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line for the person, on stderr."""
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def waiting_for(text: str) -> Iterator[None]:
    """Show a line on a terminal's stderr for as long as something takes."""
    if not has_colors(sys.stderr):
        yield
        return
    print(dim(text, sys.stderr), end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(ERASE_LINE, end="", file=sys.stderr, flush=True)


def forgive_encoding() -> None:
    """A terminal that cannot show a character shows a question mark; no generation fails for it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def abandon_stdout() -> None:
    """After a `BrokenPipeError`: let the interpreter's last flush go nowhere instead of complaining."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

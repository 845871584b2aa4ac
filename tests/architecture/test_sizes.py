"""A file fits into one reading, a function onto one screen."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from tests.architecture.source import functions, package_files, parsed

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 34
MEDIAN_FUNCTION_LINES = 10


def function_lines(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines from `def` to its end) of every function."""
    for node in functions(parsed(source)):
        assert node.end_lineno is not None
        yield node.name, node.end_lineno - node.lineno + 1


def oversized(path: str, source: str) -> list[str]:
    """What is too long in one file, in words."""
    lines = source.count("\n")
    found = [f"{path} has {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    return found + [
        f"{path}: {name} has {length} lines, at most {MAX_FUNCTION_LINES}"
        for name, length in function_lines(source)
        if length > MAX_FUNCTION_LINES
    ]


def test_no_file_and_no_function_is_too_long() -> None:
    assert [line for path, source in package_files().items() for line in oversized(path, source)] == []


def test_median_function_is_short() -> None:
    lengths = [length for source in package_files().values() for _, length in function_lines(source)]
    assert median(lengths) < MEDIAN_FUNCTION_LINES


def test_checker_sees_long_files_and_long_functions() -> None:
    long_function = "def f():\n" + "    x = 1\n" * 34
    assert oversized("a.py", long_function) == ["a.py: f has 35 lines, at most 34"]
    assert oversized("b.py", "x = 1\n" * 351) == ["b.py has 351 lines, at most 350"]
    assert oversized("c.py", "def f():\n" + "    x = 1\n" * 33) == []

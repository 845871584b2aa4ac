"""What keeps the package readable: types instead of `Any`, noun phrases for values, constructors of few arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture.source import functions, package_files, parsed

MAX_ANY_PER_1000_LINES = 6.0
MAX_SHARE_OF_ODD_NAMES = 0.005
MAX_CONSTRUCTOR_ARGUMENTS = 8
# Words that say nothing of a value.
ODD_NAMES = frozenset(
    {
        *("found", "own", "most", "one", "ones", "some", "each", "wanted", "made", "given", "left", "told", "known"),
        *("kept", "held", "least", "rest", "others", "other", "another", "more", "many", "those", "these", "whose"),
        *("said", "says", "meant", "asked", "named", "shown", "began", "gone", "seen", "taken", "whole", "everybody"),
        *("nobody", "somebody", "anybody", "both", "neither", "ended", "begun", "drawn", "worth"),
    }
)


def values(tree: ast.AST) -> Iterator[str]:
    """Every name that is assigned, and every argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def num_any(tree: ast.AST) -> int:
    """How often a file says `Any`."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def large_constructors(path: str, tree: ast.AST) -> list[str]:
    """Constructors with too many arguments, in words. A frozen record groups what belongs together."""
    found = []
    for node in functions(tree):
        count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) - 1
        if node.name == "__init__" and count > MAX_CONSTRUCTOR_ARGUMENTS:
            found.append(f"{path}:{node.lineno} takes {count} arguments, at most {MAX_CONSTRUCTOR_ARGUMENTS}")
    return found


def test_any_is_rare() -> None:
    trees = [parsed(source) for source in package_files().values()]
    lines = sum(source.count("\n") for source in package_files().values())
    assert 1000 * sum(map(num_any, trees)) / lines <= MAX_ANY_PER_1000_LINES


def test_values_have_names_that_say_what_they_are() -> None:
    names = [name for source in package_files().values() for name in values(parsed(source))]
    odd = [name for name in names if name.strip("_") in ODD_NAMES]
    assert len(odd) / len(names) < MAX_SHARE_OF_ODD_NAMES, sorted(set(odd))


def test_constructors_take_few_arguments() -> None:
    assert [line for path, source in package_files().items() for line in large_constructors(path, parsed(source))] == []


def test_checker_counts_what_it_says() -> None:
    tree = parsed("from typing import Any\ndef f(found: Any, *, n: int) -> Any:\n    most, x = 1, 2\n")
    assert num_any(tree) == 2
    assert set(values(tree)) == {"found", "n", "most", "x"}
    nine = ", ".join(f"a{i}" for i in range(9))
    assert large_constructors("a.py", parsed(f"class A:\n    def __init__(self, {nine}): ...")) == [
        "a.py:2 takes 9 arguments, at most 8"
    ]
    assert large_constructors("a.py", parsed(f"def f(self, {nine}): ...")) == []

"""The public interface is what `public_api.txt` beside this file says, a line per signature, field and value.

An intended change is an edit of that line; the failing test prints the lines to take out (-) and to put in (+).
`python tests/architecture/test_public_api.py` prints the whole file anew.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import inspect
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import errors

SNAPSHOT = Path(__file__).with_name("public_api.txt")
# Of the time that the light dependencies take (0.15 s on a quiet core): a busy machine slows down both. Measured with
# 138 modules: 0.56, and 1.05 where Python neither finds nor writes bytecode.
IMPORT_BUDGET = 1.2
CALLED_BY_SYNTAX = {"__init__", "__call__", "__await__", "__iter__", "__aiter__", "__enter__", "__aenter__"}
OURS = ("penstock", __name__.split(".")[0])
HEAVY = ("torch", "transformers")


def describe() -> list[str]:
    """The public interface as lines, in the order of `__all__`."""
    names = [name for name in penstock.__all__ if name != "__version__"]
    return [line for name in names for line in describe_one(name, getattr(penstock, name))]


def describe_one(name: str, thing: Any) -> Iterator[str]:
    """One public class: a line for its head and one per member that Penstock defines; a function is one line."""
    if inspect.isfunction(thing):
        yield f"{name}{shown_signature(thing)}"
        return
    if isinstance(thing, types.UnionType):
        yield f"{name} = {thing}"
        return
    yield f"{name}({', '.join(base.__name__ for base in thing.__bases__ if base is not object)})"
    if issubclass(thing, enum.Enum):
        yield from (f"{name}.{member.name} = {member.value!r}" for member in thing)
        return
    yield from (f"{name}.{field}" for field in describe_fields(thing))
    yield from (f"{name}.{member}" for member in describe_members(thing))


def describe_fields(thing: type) -> Iterator[str]:
    """Fields of a dataclass or of a pydantic model, with their types and defaults."""
    if dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield f"{field.name}: {field.type}{shown_default(field.default, dataclasses.MISSING)}"
    for name, info in getattr(thing, "model_fields", {}).items():
        yield f"{name}: {inspect.formatannotation(info.annotation)}{shown_default(info.default, ...)}"


def shown_default(value: object, missing: object) -> str:
    return "" if value is missing else f" = {value!r}"


def describe_members(thing: type) -> Iterator[str]:
    """Methods with their signatures, and properties; what dataclass generates is implied by the fields."""
    has_fields = dataclasses.is_dataclass(thing) or hasattr(thing, "model_fields")
    ours = [base for base in reversed(thing.__mro__) if base.__module__.split(".")[0] in OURS]
    for name, member in {name: member for base in ours for name, member in vars(base).items()}.items():
        if name.startswith("_") and name not in CALLED_BY_SYNTAX - ({"__init__"} if has_fields else set()):
            continue
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(function):
            yield f"{name}{shown_signature(function)}{' async' if inspect.iscoroutinefunction(function) else ''}"
        elif isinstance(member, property):
            yield name


def shown_signature(function: Any) -> str:
    """Names, kinds and defaults; the types are mypy's business."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for name, p in signature.parameters.items() if name not in ("self", "cls")]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def drawn_tree(drawing: str) -> dict[str, tuple[str, str | None]]:
    """Error name -> (parent, builtin base) as a docstring draws them."""
    tree: dict[str, tuple[str, str | None]] = {}
    path: list[tuple[int, str]] = [(-1, "Exception")]
    for match in re.finditer(r"^([ │├└─]*)([A-Z]\w+)(?: \((\w+)\))?(?: {2,}.*)?$", drawing, re.MULTILINE):
        depth = len(match[1])
        path = [entry for entry in path if entry[0] < depth]
        tree[match[2]] = (path[-1][1], match[3])
        path.append((depth, match[2]))
    return tree


def actual_tree() -> dict[str, tuple[str, str | None]]:
    """The same, read from the classes; private classes between two public ones do not count."""
    public = [
        c
        for name, c in vars(errors).items()
        if isinstance(c, type) and c.__module__ == errors.__name__ and not name.startswith("_")
    ]
    return {c.__name__: (public_parent(c), builtin_base(c)) for c in public}


def public_parent(error: type) -> str:
    return next(base.__name__ for base in error.__mro__[1:] if not base.__name__.startswith("_"))


def builtin_base(error: type) -> str | None:
    own = [base.__name__ for base in error.__bases__ if base.__module__ == "builtins" and base is not Exception]
    return own[0] if own else None


def import_in_fresh_interpreter() -> tuple[float, list[str]]:
    """(CPU time of `import penstock` relative to that of its light dependencies, which heavy libraries it loaded)."""
    code = (
        "import json, sys, time; times = [time.process_time()]; "
        "import asyncio, pydantic_settings, structlog; times.append(time.process_time()); "
        "import penstock; times.append(time.process_time()); "
        "ratio = (times[2] - times[1]) / (times[1] - times[0]); "
        f"print(json.dumps([ratio, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio, heavy = json.loads(run.stdout)
    return ratio, heavy


def test_all_is_sorted() -> None:
    # The order of ruff's RUF022: constants, then classes, then the rest.
    order = [(not name.isupper(), not name[0].isupper(), name) for name in penstock.__all__]
    assert order == sorted(order)


def test_all_names_everything_public_and_nothing_else() -> None:
    defined = {
        name for name in dir(penstock) if not name.startswith("_") and not inspect.ismodule(getattr(penstock, name))
    }
    assert defined == set(penstock.__all__) - {"__version__"}


@pytest.mark.parametrize("name", [name for name in penstock.__all__ if name != "__version__"])
def test_public_name_has_a_docstring_of_its_own(name: str) -> None:
    thing = getattr(penstock, name)
    if isinstance(thing, types.UnionType):
        return  # an alias has none
    doc = (thing.__doc__ if inspect.isfunction(thing) else vars(thing).get("__doc__")) or ""
    assert doc.strip(), f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"


def test_public_interface_is_the_written_one() -> None:
    written = SNAPSHOT.read_text().splitlines()
    changes = [line for line in difflib.ndiff(written, describe()) if line[0] in "+-"]
    assert not changes, f"{SNAPSHOT.name} says otherwise:\n" + "\n".join(changes)


def test_error_tree_is_the_drawn_one() -> None:
    assert drawn_tree(errors.__doc__ or "") == actual_tree()


def test_errors_are_all_public() -> None:
    assert actual_tree().keys() <= set(penstock.__all__)


def test_import_is_light_and_quick() -> None:
    runs = [import_in_fresh_interpreter() for _ in range(3)]
    assert runs[0][1] == []
    assert min(ratio for ratio, _ in runs) < IMPORT_BUDGET


def test_checker_reads_a_drawn_tree() -> None:
    drawing = (
        "Errors.\n\n    Base\n    ├── Bad (ValueError)  one\n    │   └── Worse     two\n    └── Late          three\n"
    )
    assert drawn_tree(drawing) == {
        "Base": ("Exception", None),
        "Bad": ("Base", "ValueError"),
        "Worse": ("Bad", None),
        "Late": ("Base", None),
    }


def test_checker_sees_a_changed_signature() -> None:
    class Old:
        def run(self, prompt: str, *, seed: int = 0) -> None: ...

    class New:
        async def run(self, prompt: str, *, seed: int = 1) -> None: ...

    assert list(describe_one("A", Old)) == ["A()", "A.run(prompt, *, seed=0)"]
    assert list(describe_one("A", New)) == ["A()", "A.run(prompt, *, seed=1) async"]


if __name__ == "__main__":
    print("\n".join(describe()))

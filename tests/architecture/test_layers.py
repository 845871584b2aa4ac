"""Who may import whom. The table is the one in docs/design.md; the import graph is read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import penstock
from tests.architecture.source import module_name, package_files, parsed

# Top row first; a part imports only from rows below its own. Parts in one set never import each other,
# those in a tuple may, as long as no cycle of modules comes of it.
ROWS: tuple[frozenset[str] | tuple[str, ...], ...] = (
    ("penstock", "__main__"),
    ("cli",),
    frozenset({"serving", "facades", "testing", "utils"}),
    ("backends", "training"),
    ("engine", "tools"),
    frozenset({"scheduling", "models"}),
    frozenset({"cache", "optimizers", "constraints"}),
    ("kernels",),
    ("api",),
    ("step",),
    (
        "sequence",
        "outputs",
        "config",
        "held_settings",
        "constraint",
        "generation",
        "sampling",
        "pooling",
        "scores",
        "scoring",
        "processors",
        "structured_outputs",
        "values",
        "errors",
        "demo",
    ),
)
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}

ENGINE_AND_ABOVE = frozenset(part for part, rank in RANK.items() if rank <= RANK["engine"])
ASYNC_PARTS = ENGINE_AND_ABOVE | {"api"}
TENSOR_PARTS = frozenset({"models", "kernels", "training", "optimizers", "constraints"})

# Library -> parts that may import it. `LAZILY` may import it too, inside a function.
LIBRARIES = {
    "torch": TENSOR_PARTS,
    "transformers": TENSOR_PARTS,
    "asyncio": ASYNC_PARTS,
    "anyio": ASYNC_PARTS,
    "uvloop": ASYNC_PARTS,
    "threading": ASYNC_PARTS | TENSOR_PARTS,  # the core has no locks
}
# Consumers of an engine are written against `api`; only these name the native engine, and only its classes.
ENGINE_MAKERS = frozenset({"penstock", "cli", "facades", "training"})
ENGINE_CLASSES = ("penstock.engine.inference", "penstock.engine.replicas.engine")
# Admission counts requests on the callers' threads, before the engine's thread sees them; results are kept for callers.
EXCEPTIONS = frozenset({("penstock.scheduling.admission", "threading"), ("penstock.cache.responses", "threading")})
LAZILY = {"torch": ENGINE_AND_ABOVE, "transformers": ENGINE_AND_ABOVE}
WEIGHT_HALF = "penstock.backends.weight"  # of the backends only this may import torch at module level


@dataclass(frozen=True)
class Import:
    """`module` imports `target` (`penstock.x.y`, or a library's top name); `lazy` when inside a function."""

    module: str
    target: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.module} imports {self.target}"


def modules_of(files: Mapping[str, str]) -> dict[str, ast.Module]:
    """Syntax trees by dotted name."""
    return {module_name(path): parsed(source) for path, source in files.items()}


def part_of(module: str) -> str:
    """The name in `ROWS` that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def imports_of(module: str, tree: ast.AST, known: Iterable[str], lazy: bool = False) -> Iterator[Import]:
    """Every import statement of a module, resolved to a module of the package or the top name of a library."""
    for node in ast.iter_child_nodes(tree):
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for target in targets_of(node, known):
            yield Import(module, target, lazy)
        yield from imports_of(module, node, known, inside)


def targets_of(node: ast.AST, known: Iterable[str]) -> list[str]:
    """What one statement imports; `from penstock.cache import manager` is `penstock.cache.manager`."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        names = [submodule(node.module or "", alias.name, known) for alias in node.names]
    else:
        return []
    return [name if is_ours(name) else name.split(".")[0] for name in names if name != "penstock.__version__"]


def submodule(package: str, name: str, known: Iterable[str]) -> str:
    """What `from package import name` reaches: a module of that name, else the package."""
    full = f"{package}.{name}"
    return full if full in known or full == "penstock.__version__" else package


def is_ours(name: str) -> bool:
    """Whether a dotted name is inside the package."""
    return name.split(".")[0] == "penstock"


def all_imports(files: Mapping[str, str]) -> list[Import]:
    """Every import of every module given."""
    trees = modules_of(files)
    return [found for module, tree in trees.items() for found in imports_of(module, tree, trees.keys())]


def goes_down(found: Import) -> bool:
    """Whether an import inside the package obeys the table."""
    source, target = part_of(found.module), part_of(found.target)
    if source == target or RANK[source] < RANK[target]:
        return True
    return RANK[source] == RANK[target] and isinstance(ROWS[RANK[source]], tuple)


def names_the_engine(found: Import) -> bool:
    """Whether an import outside the native engine reaches into it, other than for its classes, to make one."""
    if part_of(found.target) != "engine" or part_of(found.module) == "engine":
        return False
    return found.target not in ENGINE_CLASSES or part_of(found.module) not in ENGINE_MAKERS


def may_use(found: Import) -> bool:
    """Whether an import of a library obeys the table."""
    part = part_of(found.module)
    return (
        found.target not in LIBRARIES
        or part in LIBRARIES[found.target]
        or (found.module, found.target) in EXCEPTIONS
        or (found.lazy and part in LAZILY.get(found.target, ()))
        or (found.target in LAZILY and found.module.startswith(WEIGHT_HALF))
    )


def layer_violations(files: Mapping[str, str]) -> list[str]:
    """Imports that the table forbids, in words."""
    return [
        str(found)
        for found in all_imports(files)
        if not (goes_down(found) if is_ours(found.target) else may_use(found))
    ]


def engine_reach(files: Mapping[str, str]) -> list[str]:
    """Imports of `tools` that reach above the base rows and `api`, in words: it parses text for engines of any kind."""
    return [
        str(found)
        for found in all_imports(files)
        if part_of(found.module) == "tools"
        and is_ours(found.target)
        and part_of(found.target) != "tools"
        and RANK[part_of(found.target)] < RANK["api"]
    ]


def import_cycle(files: Mapping[str, str]) -> list[str]:
    """The modules of one import cycle, or none. Imports inside functions count: they only hide a knot."""
    graph: dict[str, set[str]] = {}
    for found in all_imports(files):
        if is_ours(found.target) and found.target != found.module:
            graph.setdefault(found.module, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def type_checking_knots(files: Mapping[str, str]) -> list[str]:
    """Files that mention TYPE_CHECKING."""
    return [
        path
        for path, source in files.items()
        for node in ast.walk(parsed(source))
        if "TYPE_CHECKING" in (getattr(node, "id", ""), getattr(node, "attr", ""))
    ]


def test_every_part_has_its_row() -> None:
    assert {part_of(module_name(path)) for path in package_files()} - RANK.keys() == set()


def test_imports_go_down() -> None:
    assert layer_violations(package_files()) == []


def test_tools_know_no_engine() -> None:
    assert engine_reach(package_files()) == []


def test_checker_sees_tools_that_reach_into_an_engine() -> None:
    source = "from penstock.cache import pool\nfrom penstock.api.prompt import Prompt\nimport penstock.errors"
    files = {"penstock/tools/a.py": source, "penstock/cache/pool.py": "", "penstock/api/prompt.py": ""}
    assert engine_reach(files) == ["penstock.tools.a imports penstock.cache.pool"]


def test_only_makers_of_an_engine_name_the_native_one() -> None:
    assert [str(found) for found in all_imports(package_files()) if names_the_engine(found)] == []


def test_modules_import_each_other_in_no_circle() -> None:
    assert import_cycle(package_files()) == []


def test_nothing_is_imported_for_type_checkers_only() -> None:
    """But for the names of the package that are imported when they are first asked for."""
    files = {path: source for path, source in package_files().items() if path != "penstock/__init__.py"}
    assert type_checking_knots(files) == []


def test_names_that_are_imported_late_are_those_that_type_checkers_see() -> None:
    tree = parsed(package_files()["penstock/__init__.py"])
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == penstock._LATER


def test_checker_sees_an_import_that_goes_up() -> None:
    files = {
        "penstock/cache/pool.py": "from penstock.engine import text",
        "penstock/engine/text.py": "from penstock.errors import RequestError\nimport json",
        "penstock/errors.py": "def f():\n    import penstock.engine.text",
    }
    assert layer_violations(files) == [
        "penstock.cache.pool imports penstock.engine.text",
        "penstock.errors imports penstock.engine.text",
    ]


def test_checker_sees_neighbours_that_import_each_other() -> None:
    files = {"penstock/scheduling/a.py": "import penstock.models.b", "penstock/models/b.py": "import penstock.cache.c"}
    assert layer_violations(files) == ["penstock.scheduling.a imports penstock.models.b"]


def test_checker_sees_libraries_in_the_wrong_part() -> None:
    files = {
        "penstock/scheduling/a.py": "import asyncio\ndef f():\n    import torch.nn",
        "penstock/engine/b.py": "import asyncio\nimport torch\ndef f():\n    import torch",
        "penstock/models/c.py": "from torch import nn",
        "penstock/backends/weights.py": "import torch",
        "penstock/backends/http.py": "import torch",
    }
    assert layer_violations(files) == [
        "penstock.scheduling.a imports asyncio",
        "penstock.scheduling.a imports torch",
        "penstock.engine.b imports torch",
        "penstock.backends.http imports torch",
    ]


def test_checker_sees_consumers_that_reach_into_the_engine() -> None:
    files = {
        "penstock/serving/a.py": "from penstock.engine.inference import InferenceEngine",
        "penstock/cli/b.py": "from penstock.engine.inference import InferenceEngine\nimport penstock.engine.loop.core",
        "penstock/engine/inference.py": "import penstock.engine.loop.core",
        "penstock/engine/loop/core.py": "",
    }
    assert [str(found) for found in all_imports(files) if names_the_engine(found)] == [
        "penstock.serving.a imports penstock.engine.inference",
        "penstock.cli.b imports penstock.engine.loop.core",
    ]


def test_checker_sees_cycles_and_knots() -> None:
    files = {
        "penstock/cache/a.py": "from penstock.cache.b import g",
        "penstock/cache/b.py": "def g():\n    from penstock.cache import a",
        "penstock/cache/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import json",
    }
    assert set(import_cycle(files)) == {"penstock.cache.a", "penstock.cache.b"}
    assert type_checking_knots(files) == ["penstock/cache/c.py"]
    assert import_cycle({"penstock/a.py": "import penstock.b", "penstock/b.py": "import json"}) == []


def test_checker_knows_that_the_root_is_on_top() -> None:
    files = {"penstock/__init__.py": "import penstock.cli", "penstock/cli.py": "from penstock import LLM, __version__"}
    assert layer_violations(files) == ["penstock.cli imports penstock"]

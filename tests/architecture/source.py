"""The package as syntax trees, for the checkers in this folder. They read the sources and never import them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: str) -> str:
    """`penstock/cache/__init__.py` is `penstock.cache`."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def package_files() -> Mapping[str, str]:
    """Source text of every module of the package, by path relative to the checkout."""
    files = sorted((ROOT / "penstock").rglob("*.py"))
    assert files, f"no package under {ROOT}"
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


@cache
def parsed(source: str) -> ast.Module:
    """The syntax tree of a source, made once for all checkers, which only read it."""
    return ast.parse(source)


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    """Every function, methods and nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))

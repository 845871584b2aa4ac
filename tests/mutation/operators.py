"""Mutants of one source file: every single change that a good test suite should notice.

Owns the operators and the names of mutants. Never runs anything and never writes a file: a mutant is the changed text.
Docstrings, annotations, decorators, asserts, log lines, messages, `__repr__` and the values of named constants stay.
"""

from __future__ import annotations

import ast
import copy
import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Replacement = tuple[Any, str]  # what is replaced, and the text in its place
Operator = Callable[[ast.AST], Iterator[Replacement]]

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
_OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_LOGGERS = {"log", "_log", "logger", "warnings"}
_SILENT_FUNCTIONS = {"__repr__", "__str__"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change. `id` does not depend on the rest of the file, so that verdicts survive changes elsewhere."""

    file: str
    function: str
    operator: str
    before: str
    after: str
    line: int
    number: int  # of those in this function that read the same
    original: str = field(repr=False)  # the whole file
    begin: int  # the bytes of it that are replaced
    end: int

    @property
    def source(self) -> str:
        """The whole file, changed."""
        data = self.original.encode()
        return (data[: self.begin] + self.after.encode() + data[self.end :]).decode()

    @property
    def is_valid(self) -> bool:
        """Whether the file still compiles, to different code."""
        try:
            changed = ast.parse(self.source)
        except SyntaxError:
            return False
        return ast.dump(changed) != ast.dump(ast.parse(self.original))

    @property
    def id(self) -> str:
        """The same in every version of the file in which this change can be made."""
        number = f" #{self.number}" if self.number > 1 else ""
        return f"{self.file}:{self.function}: {self.operator}: {_line(self.before)} -> {_line(self.after)}{number}"

    def diff(self) -> str:
        """The change as a unified diff."""
        lines = (text.splitlines(keepends=True) for text in (self.original, self.source))
        return "".join(difflib.unified_diff(*lines, f"a/{self.file}", f"b/{self.file}", n=2))


def mutants(file: str, source: str) -> list[Mutant]:
    """All mutants of a file, in the order of the text; a few are not valid."""
    found: list[Mutant] = []
    counts: Counter[tuple[str, ...]] = Counter()
    data = source.encode()
    starts = [0, *itertools.accumulate(map(len, data.splitlines(keepends=True)))]
    for function, node in _places(ast.parse(source), "<module>"):
        for name, operator in OPERATORS.items():
            for target, after in operator(node):
                # Columns of a syntax tree count bytes.
                begin = starts[target.lineno - 1] + target.col_offset
                end = starts[target.end_lineno - 1] + target.end_col_offset
                key = (function, name, data[begin:end].decode(), after)
                counts[key] += 1
                found.append(Mutant(file, *key, target.lineno, counts[key], source, begin, end))
    return sorted(found, key=lambda mutant: mutant.begin)


def _line(text: str) -> str:
    return " ".join(text.split())


# Where changes are looked for.


def _places(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    """All nodes that may be changed, each with the qualified name of its function or class."""
    for child in _children(node):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name in _SILENT_FUNCTIONS or (ast.get_docstring(child) or "").endswith("For tests."):
                continue
            inside = child.name if function == "<module>" else f"{function}.{child.name}"
        yield inside, child
        yield from _places(child, inside)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    for name, value in ast.iter_fields(node):
        if name in (
            "annotation",
            "returns",
            "decorator_list",
            "bases",
            "keywords" if isinstance(node, ast.ClassDef) else "",
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_silent(child, node):
                yield child


def _is_silent(node: ast.AST, parent: ast.AST) -> bool:
    """Whether no test has to notice the change, or the node cannot be separated from the text around it."""
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(parent, ast.Raise):  # the error's message; that it is raised at all is the statement's own change
        return True
    if isinstance(node, ast.keyword) and node.arg == "strict":  # `zip` asserts
        return True
    if isinstance(parent, ast.Module) and isinstance(node, ast.Assign | ast.AnnAssign):
        return True
    return isinstance(node, ast.Expr) and _is_log_line(node.value)


def _is_log_line(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Await) else node
    if not isinstance(call, ast.Call):
        return False
    names = {
        child.attr if isinstance(child, ast.Attribute) else getattr(child, "id", "") for child in ast.walk(call.func)
    }
    return bool(names & _LOGGERS)


# The operators: what to put in place of a node, or of a part of it.


def _comparison(node: ast.AST) -> Iterator[Replacement]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in _COMPARISONS[type(op)]:
                yield node, _with(node, lambda new, i=i, other=other: new.ops.__setitem__(i, other()))


def _arithmetic(node: ast.AST) -> Iterator[Replacement]:
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC and not _is_text(node):
        yield node, _with(node, lambda new: setattr(new, "op", _ARITHMETIC[type(new.op)]()))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield node, ast.unparse(node.operand)


def _boolean(node: ast.AST) -> Iterator[Replacement]:
    if isinstance(node, ast.BoolOp):
        yield node, _with(node, lambda new: setattr(new, "op", ast.Or() if isinstance(new.op, ast.And) else ast.And()))
        if len(node.values) > 1:
            for i in range(len(node.values)):
                yield node, _with(node, lambda new, i=i: new.values.pop(i))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, ast.unparse(node.operand)
    if isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        yield node.test, f"not {ast.unparse(node.test)}"


def _constant(node: ast.AST) -> Iterator[Replacement]:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield node, repr(node.value + 1)
        yield node, f"({node.value - 1!r})"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, repr(not node.value)


def _statement(node: ast.AST) -> Iterator[Replacement]:
    stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if stored or called or isinstance(node, ast.AugAssign | ast.Delete | ast.Raise):
        yield node, "pass"
    if isinstance(node, ast.Return):
        if node.value is None:
            yield node, "pass"
        elif ast.unparse(node.value) != "False":  # whoever asks for a truth takes None for that
            yield node.value, "None"
    if isinstance(node, ast.Continue):
        yield node, "break"
    if isinstance(node, ast.Break):
        yield node, "continue"


def _order(node: ast.AST) -> Iterator[Replacement]:
    """Arguments and branches that change places; `min` for `max`."""
    if isinstance(node, ast.Call):
        if len(node.args) > 1 and not (isinstance(node.func, ast.Name) and node.func.id in _OPPOSITES):
            yield node, _with(node, lambda new: new.args.insert(0, new.args.pop(1)))
        if isinstance(node.func, ast.Name) and node.func.id in _OPPOSITES:
            yield node.func, _OPPOSITES[node.func.id]
    if isinstance(node, ast.IfExp):
        yield node, _with(node, lambda new: new.__dict__.update(body=new.orelse, orelse=new.body))


def _slice(node: ast.AST) -> Iterator[Replacement]:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        for bound in ("lower", "upper"):
            if getattr(node.slice, bound) is not None:
                yield node, _with(node, lambda new, bound=bound: setattr(new.slice, bound, None))


OPERATORS: dict[str, Operator] = {
    "comparison": _comparison,
    "arithmetic": _arithmetic,
    "boolean": _boolean,
    "constant": _constant,
    "statement": _statement,
    "order": _order,
    "slice": _slice,
}


def _with(node: ast.AST, change: Callable[[Any], object]) -> str:
    """The text of a node after a change; in parentheses where that keeps its neighbours apart from it."""
    changed = copy.deepcopy(node)
    change(changed)
    if isinstance(changed, ast.BoolOp) and len(changed.values) == 1:
        changed = changed.values[0]
    text = ast.unparse(changed)
    is_one = isinstance(changed, ast.stmt | ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant)
    return text if is_one else f"({text})"


def _is_text(node: ast.BinOp | ast.AugAssign) -> bool:
    """Whether strings or lists are put together: the opposite is a `TypeError`, which says nothing about the tests."""
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return any(isinstance(side, ast.JoinedStr | ast.List | ast.Tuple) or _is_string(side) for side in sides)


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)

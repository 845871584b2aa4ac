"""The writers of each field of the two mutable records: `Sequence`, whose table is in docs/design.md, and `Request`.

A write is an assignment, a deletion or a mutating call through a name that holds a record: one that is annotated with
its class, or is called like one (`seq`, `victim`, `best_seq`, `self.seq`, an element of `seqs` or `running`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.architecture.source import FunctionNode, package_files, parsed

SCHEDULER = "penstock/scheduling/scheduler.py"
PLANNING = "penstock/scheduling/planning.py"  # `Scheduler.plan`
SEARCHES = "penstock/scheduling/searches.py"  # `Scheduler.commit`, of beams
LIVE = "penstock/scheduling/live.py"  # start, preempt, finish
CACHE_MANAGER = "penstock/cache/manager.py"
CONSTRUCTOR = "penstock/sequence.py"

# Field -> the functions that may write it, by file.
WRITERS: dict[str, dict[str, set[str]]] = {
    "tokens": {SCHEDULER: {"_settle"}, SEARCHES: {"_continue", "_conclude"}},
    "draft": {SCHEDULER: {"offer", "_settle"}, PLANNING: {"_extend"}, LIVE: {"preempt", "finish"}},
    "computed": {SCHEDULER: {"_settle"}, SEARCHES: {"_continue"}, PLANNING: {"_start"}, LIVE: {"preempt"}},
    "in_flight": {PLANNING: {"_plan_running", "_add_row"}, SCHEDULER: {"_settle", "fail", "restart"}},
    "blocks": {CACHE_MANAGER: {"attach", "reserve", "release", "_take_shares", "_copy_tail", "_make_private"}},
    "status": {LIVE: {"_move"}},
    "reason": {LIVE: {"_move"}},
}
FIXED_AT_BIRTH = (
    *("id", "request_id", "params", "max_len", "stop_ids", "seed", "sample_index", "priority"),
    *("arrival", "deadline", "ttft_deadline", "namespace", "adapter", "parent", "constraint", "prompt_len"),
    *("scored", "max_cached"),
)
WRITERS |= {name: {CONSTRUCTOR: {"__post_init__"}} for name in FIXED_AT_BIRTH}

REQUEST = "penstock/engine/requests/request.py"
INPUTS = "penstock/engine/requests/input_processor.py"
OUTPUTS = "penstock/engine/requests/output_processor.py"
REQUEST_WRITERS: dict[str, dict[str, set[str]]] = {
    **{name: {INPUTS: {"admit"}} for name in ("collector", "sequences", "search")},
    "started": {OUTPUTS: {"mark_started"}},
    **{name: {OUTPUTS: {"_time_tokens"}} for name in ("first_token", "last_token")},
}
REQUEST_FIXED_AT_BIRTH = (
    *("id", "prompt", "params", "channel", "arrival", "priority", "deadline", "ttft_deadline", "namespace", "place"),
    *("adapter", "seed", "origin", "sample_indices", "num_continued"),
)
REQUEST_WRITERS |= {name: {} for name in REQUEST_FIXED_AT_BIRTH}


@dataclass(frozen=True)
class Record:
    """A class, the file that defines it, its table of writers, and how names of it and of its collections end."""

    name: str
    path: str
    writers: dict[str, dict[str, set[str]]]
    names: frozenset[str]
    collections: frozenset[str]
    suffix: str

    @property
    def types(self) -> frozenset[str]:
        """Annotations of a name that holds one."""
        return frozenset({self.name, f"{self.name} | None", f"None | {self.name}"})


SEQUENCES = Record(
    "Sequence",
    CONSTRUCTOR,
    WRITERS,
    frozenset({"seq", "sequence", "victim", "child", "parent", "sibling", "candidate", "worst", "best"}),
    frozenset({"seqs", "sequences", "running", "waiting", "children", "siblings", "victims"}),
    "_seq",
)
REQUESTS = Record(
    "Request", REQUEST, REQUEST_WRITERS, frozenset({"request", "loser"}), frozenset({"requests"}), "_request"
)
RECORDS = (SEQUENCES, REQUESTS)
MUTATORS = frozenset(
    {"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "frombytes", "fromlist", "byteswap"}
)


@dataclass(frozen=True)
class Write:
    """`function` in `path` writes `field` of a record."""

    path: str
    function: str
    field: str
    record: Record = SEQUENCES

    def __str__(self) -> str:
        return f"{self.path}: {self.function} writes {self.field}"

    @property
    def allowed(self) -> bool:
        """Whether the table names this writer."""
        return self.function in self.record.writers[self.field].get(self.path, ())


@dataclass
class Writes(ast.NodeVisitor):
    """Collects the writes to one record in one file."""

    path: str
    record: Record

    def __post_init__(self) -> None:
        self.found: list[Write] = []
        self.function = "module level"
        self.names: frozenset[str] = self.record.names  # names that hold one, here
        self.aliases: dict[str, str] = {}  # local names for its lists: `blocks = seq.blocks`

    def visit_FunctionDef(self, node: FunctionNode) -> None:
        outer = self.function, self.names, self.aliases
        declared = annotations(node)
        sequences = {name for name, kind in declared.items() if kind in self.record.types}
        self.function, self.names, self.aliases = node.name, self.names - declared.keys() | sequences, {}
        self.generic_visit(node)
        self.function, self.names, self.aliases = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer = self.names
        self.names = self.names | {"self"} if node.name == self.record.name else self.names
        self.generic_visit(node)
        self.names = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            for name, value in pairs(target, node.value):
                field = self.field_of(value)
                if isinstance(name, ast.Name) and field:
                    self.aliases[name.id] = field
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not isinstance(node.ctx, ast.Load):
            self.note(self.field_of(node))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not isinstance(node.ctx, ast.Load):
            self.note(self.field_of(node.value))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):  # `blocks += ...` extends the aliased list in place
            self.note(self.field_of(node.target))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr=verb)) if verb in MUTATORS:
                self.note(self.field_of(owner))
            case ast.Call(func=ast.Name("setattr") | ast.Attribute(attr="__setattr__"), args=[owner, name, *_]):
                if self.is_record(owner):
                    self.note(name.value if isinstance(name, ast.Constant) else "status")
        self.generic_visit(node)

    def note(self, field: str | None) -> None:
        if field in self.record.writers:
            self.found.append(Write(self.path, self.function, field, self.record))

    def field_of(self, node: ast.expr) -> str | None:
        """The field of a record that an expression reads, if it does."""
        match node:
            case ast.Attribute(value=owner, attr=field) if self.is_record(owner):
                return field
            case ast.Name(name):
                return self.aliases.get(name)
        return None

    def is_record(self, node: ast.expr) -> bool:
        """Whether an expression is called like a record, or declared as one here."""
        match node:
            case ast.Name(name):
                return name in self.names or name.endswith(self.record.suffix)
            case ast.Attribute(attr=name):
                return name in self.record.names or name.endswith(self.record.suffix)
            case ast.Subscript(value=ast.Name(name) | ast.Attribute(attr=name)):
                return name.lstrip("_") in self.record.collections or name.endswith(f"{self.record.suffix}s")
        return False


def pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """Which expression goes where in `target = value`; `a, b = x, y` are two assignments."""
    match target, value:
        case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
            return list(zip(targets, values, strict=True))
    return [(target, value)]


def annotations(node: FunctionNode) -> dict[str, str]:
    """What a function's parameters and local annotations declare, as source text by name."""
    declared = {arg.arg: arg.annotation for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    for item in ast.walk(node):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            declared[item.target.id] = item.annotation
    return {name: ast.unparse(kind) for name, kind in declared.items() if kind}


def writes(path: str, source: str) -> Iterator[Write]:
    """Every write to a field of a record in one file."""
    for record in RECORDS:
        visitor = Writes(path, record)
        visitor.visit(parsed(source))
        yield from visitor.found


def all_writes() -> list[Write]:
    return [write for path, source in package_files().items() for write in writes(path, source)]


def test_only_the_writers_of_the_table_write_a_field() -> None:
    assert [str(write) for write in all_writes() if not write.allowed] == []


def test_every_writer_of_the_table_writes_its_field() -> None:
    actual = {(write.record.name, write.field, write.path, write.function) for write in all_writes()}
    listed = {
        (record.name, field, path, function)
        for record in RECORDS
        for field, writers in record.writers.items()
        for path, functions in writers.items()
        for function in functions
    }
    assert {writer for writer in listed - actual if writer[1] not in FIXED_AT_BIRTH} == set()


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_table_names_every_field_of_a_record(record: Record) -> None:
    tree = parsed(package_files()[record.path])
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == record.name).body
    fields = {item.target.id for item in body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
    assert fields == record.writers.keys()


def refused(path: str, source: str) -> list[str]:
    """Fields that a piece of source must not write there."""
    return [write.field for write in writes(path, source) if not write.allowed]


def test_checker_sees_every_form_of_writing() -> None:
    for line in (
        "seq.tokens = []",
        "seq.tokens += [1]",
        "seq.tokens.append(1)",
        "self.seq.tokens[0] = 1",
        "del seq.tokens[0]",
        "x, victim.tokens = 1, []",
        "self.running[0].tokens.extend([1])",
        "setattr(seq, 'tokens', [])",
        "object.__setattr__(draft_seq, 'tokens', [])",
        "for seq.tokens in []: pass",
        "tokens = seq.tokens; tokens.append(1)",
        "tokens = seq.tokens; tokens += [1]",
        "tokens, x = seq.tokens, 1; tokens.pop()",
    ):
        assert refused("penstock/engine/a.py", line) == ["tokens"], line
        assert refused(SCHEDULER, f"def _settle():\n    {line}") == [], line


def test_checker_knows_sequences_by_their_annotation() -> None:
    assert refused("penstock/engine/a.py", "def f(row: Sequence):\n    row.computed = 1") == ["computed"]
    assert refused("penstock/engine/a.py", "def f(row: Row):\n    row.computed = 1") == []
    assert refused("penstock/cache/a.py", "def f(parent: Node):\n    parent.tokens = 1") == []
    assert refused("penstock/engine/a.py", "class Sequence:\n    def grow(self):\n        self.computed += 1") == [
        "computed"
    ]


def test_checker_leaves_other_objects_and_reading_alone() -> None:
    for line in ("self.blocks = []", "handle.status = 1", "x = seq.tokens", "seq.tokens.index(1)", "pool.blocks.pop()"):
        assert refused("penstock/engine/a.py", line) == [], line


def test_checker_knows_requests() -> None:
    assert refused(INPUTS, "def admit(request):\n    request.collector = request.seed = 1") == ["seed"]
    assert refused(OUTPUTS, "def end(request):\n    request.sequences = []") == ["sequences"]
    assert refused("penstock/engine/a.py", "def f(origin: Request):\n    origin.started = 1") == ["started"]
    assert refused("penstock/engine/a.py", "request.channel.status = 1") == []


def test_checker_wants_the_named_function() -> None:
    source = "def {name}(self, seq):\n    seq.status = 1"
    assert refused(LIVE, source.format(name="finish")) == ["status"]
    assert refused(LIVE, source.format(name="_move")) == []
    assert refused(SCHEDULER, source.format(name="_move")) == ["status"]
    assert refused(CACHE_MANAGER, "def attach(seq):\n    seq.blocks.append(1); seq.tokens.append(1)") == ["tokens"]
    assert refused("penstock/cache/pool.py", "seq.blocks.append(1)") == ["blocks"]
    assert refused(SCHEDULER, "def add(seq):\n    seq.priority = 1") == ["priority"]

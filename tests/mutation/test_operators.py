"""Which changes are made of a text, and which never are."""

from __future__ import annotations

import ast
from textwrap import dedent

import pytest

from tests.mutation.operators import Mutant, mutants


def changes(text: str) -> list[tuple[str, str, str]]:
    """(operator, before, after) of every valid mutant of a function with this body."""
    source = "def f(a, b, c, log, self):\n" + "".join(f"    {line}\n" for line in dedent(text).strip().splitlines())
    return [(m.operator, m.before, m.after) for m in mutants("x.py", source) if m.is_valid]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < b", [("comparison", "a < b", "(a <= b)"), ("comparison", "a < b", "(a >= b)")]),
        ("a is None", [("comparison", "a is None", "(a is not None)")]),
        ("a in b", [("comparison", "a in b", "(a not in b)")]),
        ("a // b", [("arithmetic", "a // b", "(a * b)")]),
        ("-a", [("arithmetic", "-a", "a")]),
        ("[a] + b", []),
        ("a and b", [("boolean", "a and b", "(a or b)"), ("boolean", "a and b", "b"), ("boolean", "a and b", "a")]),
        ("not a", [("boolean", "not a", "a")]),
        ("a if b else c", [("order", "a if b else c", "(c if b else a)")]),
        ("if a:\n        b", [("boolean", "a", "not a")]),
        ("a = 7", [("constant", "7", "8"), ("constant", "7", "(6)")]),
        ("a = True", [("constant", "True", "False")]),
        ("return a", [("statement", "a", "None")]),
        ("return", [("statement", "return", "pass")]),
        ("return False", [("constant", "False", "True")]),
        ("raise KeyError(a + 1)", [("statement", "raise KeyError(a + 1)", "pass")]),
        ("del a[b]", [("statement", "del a[b]", "pass")]),
        ("self.a = b", [("statement", "self.a = b", "pass")]),
        ("a.b()", [("statement", "a.b()", "pass")]),
        ("await a.b()", []),
        ("a = b(a, c, key=b)", [("order", "b(a, c, key=b)", "b(c, a, key=b)")]),
        ("a = max(b, c)", [("order", "max", "min")]),
        ("a[b:c]", [("slice", "a[b:c]", "a[:c]"), ("slice", "a[b:c]", "a[b:]")]),
    ],
)
def test_a_change_of_each_kind(text: str, expected: list[tuple[str, str, str]]) -> None:
    assert changes(f"async def g():\n    {text}" if "await" in text else text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "'a docstring of 1 line'",
        "a: dict[1 + 1, 2]",
        "assert a < 3, a + b",
        "a = zip(b, strict=True)",
        "self._log.debug('step', rows=len(a) + 1)",
        "b = f'{a + 1} of {b < 2}'",
        "def __repr__(self):\n    return a + 1",
        "def check():\n    'Assert something. For tests.'\n    return a + 1",
        "@cache(1)\ndef g(): ...",
    ],
)
def test_what_no_test_has_to_notice_is_left_alone(text: str) -> None:
    assert changes(text) == []


def test_values_of_named_constants_are_choices_and_defaults_are_behaviour() -> None:
    source = "LIMIT = 3\ndef f(a: int = 4): ...\nclass C:\n    b: int = 5\n"
    assert {mutant.before for mutant in mutants("x.py", source)} == {"4", "5"}


def named(source: str, after: str) -> Mutant:
    """The mutant with this text in it."""
    (found,) = [mutant for mutant in mutants("x.py", source) if mutant.after == after]
    return found


def test_the_rest_of_the_text_stays_as_it_is() -> None:
    """Columns count bytes, not characters."""
    source = "class C:\n    def f(self, ä):\n        return ('äö', ä < 2)  # é\n"
    changed = named(source, "(ä <= 2)")
    assert changed.source == source.replace("ä < 2", "(ä <= 2)")
    assert "-        return ('äö', ä < 2)  # é\n+        return ('äö', (ä <= 2))  # é\n" in changed.diff()


def test_a_mutant_has_the_same_name_when_the_rest_of_the_file_changes() -> None:
    source = "class C:\n    def f(self, a):\n        return a < 2\n"
    first, second = (
        named(source, "(a <= 2)"),
        named("import ast\n" + source, "(a <= 2)"),
    )
    assert first.id == second.id == "x.py:C.f: comparison: a < 2 -> (a <= 2)"
    assert (first.line, second.line) == (3, 4)


def test_equal_texts_in_one_function_are_numbered() -> None:
    found = mutants("x.py", "def f(a):\n    g(a)\n    g(a)\n")
    assert [mutant.id for mutant in found] == [
        "x.py:f: statement: g(a) -> pass",
        "x.py:f: statement: g(a) -> pass #2",
    ]


def test_what_changes_nothing_or_does_not_compile_is_not_valid() -> None:
    same = mutants("x.py", "def f(a):\n    return None\n") + mutants("x.py", "def f(a):\n    h = g(a, a)\n")
    assert [mutant.is_valid for mutant in same] == [False, False]


def test_every_mutant_of_this_file_can_be_read() -> None:
    with open(__file__) as file:
        source = file.read()
    for mutant in mutants("x.py", source)[:40]:
        assert mutant.is_valid
        ast.parse(mutant.source)

from __future__ import annotations

import time
from typing import Any

import pytest

from penstock import GrammarError, StructuredOutputs
from penstock.constraints.bounds import check_bounds, expanded_length

CHAIN = "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(20)) + '\nT20: "a"'


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("abc", 3),
        ("a{3}b", 4),
        ("(ab|c){4}", 8),
        ("(a{100}){200}", 20_000),
        (r"\p{L}{5}x", 6),
        ("[a-z]{3,}", 3),
        ("[]{]{2}", 2),
        ("(?:ab){2}|x", 4),
        ("(?i)ab", 2),
        ("(?P<n>a{3}){2}", 6),
        ("a{0,9}", 1),
        ("((((", 0),
        (")))a", 4),
    ],
)
def test_the_length_of_an_expression_counts_its_repetitions(pattern: str, length: int) -> None:
    assert expanded_length(pattern) == length


def test_the_length_of_any_expression_is_found_in_linear_time() -> None:
    begin = time.process_time()
    for hostile in ("[" * 10**6, "(" * 10**5, "a{9}" * 10**5, "\\" * 10**6, "{" * 10**6):
        expanded_length(hostile)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    "values",
    [
        {"regex": "a{1000000}"},
        {"regex": "x?(a{200}){200}"},
        {"choice": ["a", "b" * 20_000]},
        {"json": {"const": "x" * 50_000}},
        {"json": {"properties": {"a": {"enum": [1, {"b": ["x" * 50_000]}]}}}},
        {"json": {"properties": {"k" * 50_000: True}}},
        {"json": {"items": {"type": "string", "pattern": "^a{99999}$"}}},
        {"json": {"patternProperties": {"a{99999}": True}}},
        {"json_object": True, "whitespace_pattern": " {99999}"},
        {"grammar": CHAIN},
        {"grammar": 'start: A\nA: "a"{1000000}'},
        {"grammar": 'start: A\nA: "a"~1000000'},
        {"grammar": "start: /a{50000}/"},
    ],
    ids=lambda value: "",
)
def test_a_terminal_that_would_slow_every_step_is_refused(values: Any) -> None:
    with pytest.raises(GrammarError, match="more than 10000 characters at a stretch"):
        check_bounds(StructuredOutputs(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"regex": "[a-z]{1,100}(foo|bar){3}"},
        {"choice": ["a", "b" * 9_000]},
        {"json": {"description": "x" * 50_000, "type": "string", "maxLength": 10**6}},
        {"grammar": 'start: A B\nA: "a"{3}\nB: /[0-9]{2}/ | A A'},
    ],
    ids=lambda value: "",
)
def test_what_is_short_is_allowed(values: Any) -> None:
    check_bounds(StructuredOutputs(**values))


def test_a_schema_that_nests_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(300):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="nested too deeply"):
        check_bounds(StructuredOutputs(json=schema))

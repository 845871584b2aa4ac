"""Schemas whose compilation would take seconds are refused before it, by what makes them slow."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import GrammarError
from penstock.constraints.schema_bounds import MAX_CONJUNCTION, check_schema

PATTERNS = [{"type": "string", "pattern": f".*{number}x.*"} for number in range(20)]


def chain(key: str) -> dict[str, Any]:
    """Every definition has a pattern of its own and refers to the next one."""
    links = {f"a{n}": {"allOf": [part, {key: f"#/$defs/a{n + 1}"}]} for n, part in enumerate(PATTERNS)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, "a20": {"type": "string"}}}


SLOW: list[tuple[str, Any]] = [
    ("properties", {"properties": {f"k{n}": True for n in range(5_000)}}),
    ("properties", {"items": [{"anyOf": [{"properties": {f"k{n}": True for n in range(5_000)}}]}]}),
    ("required", {"type": "object", "required": [f"k{n}" for n in range(5_000)]}),
    ("patternProperties", {"patternProperties": {f"^a{n}_": True for n in range(300)}}),
    ("multipleOf", {"type": "integer", "multipleOf": 999_983}),
    ("multipleOf", {"type": "number", "multipleOf": 99_999.9}),
    ("multipleOf", {"type": "integer", "multipleOf": 10**300 + 1}),
    ("enum", {"enum": [f"v{n}" for n in range(50_000)]}),
    ("number of parts", {"enum": [{"a": n} for n in range(20_000)]}),
    ("number of parts", {"const": list(range(20_000))}),
    ("number of parts", {"prefixItems": [{"type": "array", "items": {"type": "integer"}}] * 5_000}),
    ("number of patterns", {"allOf": PATTERNS}),
    ("number of patterns", {"allOf": [{"properties": {"a": part}} for part in PATTERNS]}),
    ("number of patterns", {"allOf": [{"anyOf": [part, {"type": "integer"}]} for part in PATTERNS]}),
    ("number of patterns", chain("$ref")),
    ("number of patterns", {"allOf": [{"$ref": "x"}], "$defs": {str(n): part for n, part in enumerate(PATTERNS)}}),
]


@pytest.mark.parametrize(("what", "schema"), SLOW)
def test_a_schema_that_takes_long_to_compile_is_refused_by_what_makes_it_slow(what: str, schema: Any) -> None:
    """A thousand times the compile time of real schemas occupied the threads that all prompts are encoded on."""
    with pytest.raises(GrammarError, match=f"{what}.* is .*which would take long to compile"):
        check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"properties": {f"k{n}": {"type": "string", "pattern": f"x{n}"} for n in range(900)}},
        {"anyOf": PATTERNS},
        {"allOf": PATTERNS[:MAX_CONJUNCTION]},
        {"properties": {"multipleOf": {"type": "string"}, "enum": True, "required": {"type": "array"}}},
        {"multipleOf": 1_000_000_000},
        {"multipleOf": 0.0001},
        {
            "$id": "http://x/y#",
            "items": {"$ref": "http://x/y#"},
            "properties": {str(n): p for n, p in enumerate(PATTERNS)},
        },
        {"items": {"$ref": "#"}, "anyOf": [{"$ref": "#/anyOf/1"}, *PATTERNS]},
        {"$defs": {"a/b": PATTERNS[0]}, "allOf": [{"$ref": "#/$defs/a~1b"}], "anyOf": PATTERNS},
        {"enum": [f"v{n}" for n in range(20_000)]},
    ],
)
def test_schemas_of_ordinary_size_are_not_refused(schema: Any) -> None:
    check_schema(schema)

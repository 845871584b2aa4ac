"""Plain text becomes the value that an argument's schema allows, and stays text otherwise."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.tools.coercion import allowed_types, coerced, json_text


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("null", {"type": "string"}, "null"),
        (" 5 ", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("five", {"type": "integer"}, "five"),
        ("-1.5e3", {"type": "number"}, -1500.0),
        ("5", {"type": "number"}, 5),
        ("1e999", {"type": "number"}, "1e999"),
        ("nan", {"type": "number"}, "nan"),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("1", {"type": "boolean"}, "1"),
        ("null", {"type": "null"}, None),
        ("None", {"type": ["string", "null"]}, None),
        ("5", {"type": ["string", "integer"]}, "5"),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("[1, 2", {"type": "array"}, "[1, 2"),
        ('{"a": null}', {"type": "object"}, {"a": None}),
        ("[1]", {"type": "object"}, "[1]"),
        ("5", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 5),
        ("null", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {"const": 2}, 2),
        ("2", {"$ref": "#/$defs/count"}, 2),
        ("2", {"$ref": "#/$defs/nothing"}, 2),
        ("2", {"$ref": "#/$defs/itself"}, 2),
        ("5", {}, 5),
        ("null", {}, None),
        ("NaN", {}, "NaN"),
        ("tea", {}, "tea"),
        ("[" * 100_000, {}, "[" * 100_000),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
    ],
)
def test_text_becomes_what_the_schema_allows(text: str, schema: dict[str, object], value: object) -> None:
    root = {"$defs": {"count": {"type": "integer"}, "itself": {"$ref": "#/$defs/itself"}}}
    result = coerced(text, allowed_types(schema, root))
    assert result == value
    assert type(result) is type(value)


@given(st.text(), st.sets(st.sampled_from(["integer", "number", "boolean", "null", "array", "object"])))
def test_any_text_becomes_a_value_that_json_can_hold(text: str, types: set[str]) -> None:
    value = coerced(text, frozenset(types))
    assert json.loads(json_text(value)) == value


def test_what_utf8_cannot_encode_is_escaped() -> None:
    assert json_text("é") == '"é"'
    assert json_text("\ud800") == '"\\ud800"'

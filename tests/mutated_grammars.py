"""Schemas and regular expressions that a fixed seed mutates: valid ones, broken ones, and ones of absurd size."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"type": "array", "items": {"enum": ["x", "y", 3, None, True]}, "minItems": 1, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$"},
    {"type": "number", "minimum": -2.5, "exclusiveMaximum": 10},
    {"anyOf": [{"const": "left"}, {"type": "boolean"}, {"type": "null"}]},
    {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}, "maxProperties": 3},
    {"$defs": {"tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}}, "$ref": "#/$defs/tree"},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
    {"allOf": [{"type": "object", "properties": {"k": {"type": "string"}}}, {"required": ["k"]}]},
    {"oneOf": [{"type": "integer", "multipleOf": 5}, {"type": "string", "minLength": 2, "maxLength": 4}]},
    {"type": "object", "patternProperties": {"^x_": {"type": "string"}}, "additionalProperties": False},
    {"type": ["string", "null"], "format": "date"},
)
REGEXES = (
    *("[a-z]+@[a-z]+[.](com|org)", r"\d{3}-\d{4}", "(yes|no)( thanks)?", r"[^\s]{1,8}", "(a|b)*c", "x{2,7}", r"\w+"),
    *("(?i)hello", r"(\+|-)?[0-9]+(\.[0-9]{2})?", "[A-F0-9]{8}", "(((a+)+)+)b", "^abc$", "é+|水"),
)
KEYWORDS: dict[str, tuple[Any, ...]] = {
    "type": ("string", "object", "array", "integer", "number", "boolean", "null", "nothing", 5, ["string", "array"]),
    "minLength": (0, 3, -1, 100_000, 2.5, "2"),
    "maxLength": (0, 2, -1, 1_000_000),
    "pattern": (*REGEXES, "(", "a{100000}", r"(?=b)a", "[a-z]{50}[0-9]{50}", "(a{200}){200}"),
    "minItems": (0, 2, 50_000, -3),
    "maxItems": (0, 1, 1_000_000),
    "uniqueItems": (True, False),
    "contains": ({"type": "integer"}, True),
    "minimum": (0, -1e300, 1e308, 10**30, "a"),
    "maximum": (0, 5, -7.25, 10**30),
    "multipleOf": (2, 0.1, 0, 10**20),
    "enum": ([], [1, "a", None, {"b": [2]}], "abc", [1] * 300),
    "const": (None, "x" * 3000, {"a": {"b": 1}}, [1, 2]),
    "not": ({"type": "string"}, True),
    "if": ({"const": 1},),
    "required": (["a"], ["zz", "a"], "a", []),
    "minProperties": (0, 2, 10_000),
    "dependentRequired": ({"a": ["b"]},),
    "format": ("date", "email", "uuid", "made-up", 3),
    "unevaluatedProperties": (False,),
    "propertyNames": ({"pattern": "^a"},),
    "additionalProperties": (False, True, {"type": "string"}),
    "$ref": ("#", "#/nowhere", "http://example.com/x", "#/$defs/tree"),
    "x-guidance": ({"lenient": True}, {"whitespace_flexible": False}, {"coerce_one_of": True}, 7),
    "description": ("words", 5),
    "unknown-keyword": (1, {"a": 2}),
}
_SPECIALS = "()[]{}|*+?.\\^$-,09az\n\x00é"


def mutated_schemas(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Schemas with one to five mutations each."""
    rng = random.Random(seed)
    for _ in range(count):
        schema = copy.deepcopy(rng.choice(SCHEMAS))
        for _ in range(rng.randint(1, 5)):
            rng.choice(_SCHEMA_MUTATIONS)(rng.choice(list(_objects(schema))), rng)
        yield json.loads(json.dumps(schema))


def mutated_regexes(count: int, seed: int) -> Iterator[str]:
    """Expressions with one to five mutations each."""
    rng = random.Random(seed)
    for _ in range(count):
        text = rng.choice(REGEXES)
        for _ in range(rng.randint(1, 5)):
            text = rng.choice(_REGEX_MUTATIONS)(text, rng.randint(0, len(text)), rng)
        yield text or "a"


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _objects(item)
    elif isinstance(value, list):
        for item in value:
            yield from _objects(item)


def _set_keyword(node: dict[str, Any], rng: random.Random) -> None:
    keyword = rng.choice(list(KEYWORDS))
    node[keyword] = copy.deepcopy(rng.choice(KEYWORDS[keyword]))


def _drop_keyword(node: dict[str, Any], rng: random.Random) -> None:
    if node:
        del node[rng.choice(list(node))]


def _nest(node: dict[str, Any], rng: random.Random) -> None:
    inner = copy.deepcopy(node)
    node.clear()
    wrap = rng.choice(("items", "anyOf", "allOf", "oneOf", "properties", "not"))
    many = wrap in ("anyOf", "allOf", "oneOf")
    node[wrap] = (
        [inner, copy.deepcopy(rng.choice(SCHEMAS))] if many else {"p": inner} if wrap == "properties" else inner
    )


def _multiply(node: dict[str, Any], rng: random.Random) -> None:
    node["properties"] = {f"k{i}": copy.deepcopy(rng.choice(SCHEMAS)) for i in range(rng.choice((3, 60, 400)))}


_SCHEMA_MUTATIONS: tuple[Callable[[dict[str, Any], random.Random], None], ...] = (
    *(_set_keyword, _set_keyword, _set_keyword, _drop_keyword, _nest, _multiply),
)


def _insert(text: str, place: int, rng: random.Random) -> str:
    return text[:place] + rng.choice(_SPECIALS) + text[place:]


def _delete(text: str, place: int, rng: random.Random) -> str:
    return text[:place] + text[place + rng.randint(1, 3) :]


def _repeat(text: str, place: int, rng: random.Random) -> str:
    return f"({text[:place]}){rng.choice(('*', '+', '{3}', '{2,900}', '{100000}', '{0,5000}'))}{text[place:]}"


def _alternate(text: str, place: int, rng: random.Random) -> str:
    return f"({text}|{rng.choice(REGEXES)})"


def _splice(text: str, place: int, rng: random.Random) -> str:
    return (
        text[:place]
        + rng.choice((r"\b", r"(?=a)", r"\p{L}", r"\w{40}", r"[^a]", r"\1", "(?-u:\\xff)", "."))
        + text[place:]
    )


_REGEX_MUTATIONS: tuple[Callable[[str, int, random.Random], str], ...] = (
    _insert,
    _delete,
    _repeat,
    _alternate,
    _splice,
)

"""Turns the plain text of an argument into a JSON value, by the schema of that argument.

Text that fits no type that the schema allows stays a string: the program that runs the tool validates its arguments.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

_INTEGER = re.compile(r"[+-]?\d{1,400}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,400}\.0{1,400}", re.ASCII)
_BOOLEANS = {"true": True, "false": False}
_NULLS = ("null", "none")
_MAX_REFERENCES = 16


def allowed_types(schema: object, root: Mapping[str, object]) -> frozenset[str]:
    """The names of the JSON types that a schema allows; none if it does not say. `root` resolves references."""
    return frozenset(_types(schema, root, _MAX_REFERENCES))


def coerced(text: str, types: frozenset[str]) -> object:
    """The value that the text stands for. Without types, whatever JSON it is; with "string", all but null is text."""
    word = text.strip()
    if "null" in types and word.lower() in _NULLS:
        return None
    if "string" in types:
        return text
    if not types or types & {"array", "object"}:
        value = _json(word)
        if (not types and value is not None) or isinstance(value, _python_types(types)):
            return value
        if not types and word == "null":
            return None
    if "integer" in types and (_INTEGER.fullmatch(word) or _WHOLE.fullmatch(word)):
        return int(word.partition(".")[0])
    if "number" in types and _NUMBER.fullmatch(word) and math.isfinite(float(word)):
        return int(word) if _INTEGER.fullmatch(word) else float(word)
    if "boolean" in types and word.lower() in _BOOLEANS:
        return _BOOLEANS[word.lower()]
    return text


def _types(schema: object, root: Mapping[str, object], references: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or references <= 0:
        return
    kind = schema.get("type")
    if isinstance(kind, str):
        yield kind
    elif isinstance(kind, list | tuple):
        yield from (name for name in kind if isinstance(name, str))
    elif isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list | tuple):
        yield from map(_type_of, values)
    elif "$ref" in schema:
        yield from _types(_target(schema["$ref"], root), root, references - 1)
    for key in ("anyOf", "oneOf", "allOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list | tuple) else ():
            yield from _types(option, root, references // 2)


def _type_of(value: object) -> str:
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (Mapping, "object"),
        ((list, tuple), "array"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _target(reference: object, root: Mapping[str, object]) -> object:
    """What a reference inside the document leads to, or None."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    target: object = root
    for key in reference[1:].split("/")[1:]:
        if not isinstance(target, Mapping):
            return None
        target = target.get(key.replace("~1", "/").replace("~0", "~"))
    return target


def _python_types(types: frozenset[str]) -> tuple[type, ...]:
    return tuple(kind for name, kind in (("array", list), ("object", dict)) if name in types)


def _json(text: str) -> object:
    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        return None


def finite(text: str) -> float:
    """The number. Raises `ValueError` for what JSON cannot hold."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def json_text(value: object) -> str:
    """JSON of plain values, readable unless it holds what UTF-8 cannot encode. Raises `ValueError` or `TypeError`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text

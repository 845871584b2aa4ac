"""Grammars of calls: Lark rules, in llguidance's notation, of what `tool_choice` requires a model to write.

One builder per family of formats. The rules admit a part of what the format's parser reads: the usual layout only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from penstock.errors import GrammarError
from penstock.tools.coercion import allowed_types
from penstock.tools.definitions import Tool

# White space as `json.dumps` writes it: a model could go on with spaces otherwise.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Of an object, what a format without JSON objects can follow, besides annotations.
_OBJECT_KEYWORDS = frozenset({"type", "properties", "required", "additionalProperties"})
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$schema", "$defs", "definitions", "$id"})
_TEXT_KEYWORDS = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "format"})


@dataclass(slots=True)
class Rules:
    """The rules of one grammar; each is added once, and named by its number."""

    lines: list[str] = field(default_factory=list)

    def add(self, body: str, options: str = "") -> str:
        """Add a rule and return its name."""
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body}")
        return name

    def json(self, schema: object) -> str:
        """A rule of the JSON texts that a schema admits."""
        if isinstance(schema, Mapping):
            schema = {"x-guidance": _LAYOUT, **schema}
        return self.add(f"%json {json.dumps(schema)}")

    def text_before(self, end: str) -> str:
        """A rule of any text with `end` at its end, and nowhere else."""
        return self.add(r"/(.|\n)*/", f"[suffix={literal(end)}]")


def literal(text: str) -> str:
    """The text as a literal of the grammar; nothing for none."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def repeated(calls: str, separator: str, parallel: bool) -> str:
    """One call, or with `parallel` one or more of them."""
    return f"{calls} ({literal(separator)} {calls})*" if parallel else calls


def json_call(rules: Rules, tool: Tool, key: str = "arguments") -> str:
    """{"name": "f", "arguments": {...}}"""
    head = f'{{"name": {json.dumps(tool.name)}, "{key}": '
    return rules.add(f"{literal(head)} {rules.json(tool.parameters)} {literal('}')}")


def python_call(rules: Rules, tool: Tool) -> str:
    """f(a=1, b="x"): the required arguments first, then any of the others, in the order of the schema."""
    required, optional = _arguments(tool)
    names = {name: _python_argument(rules, tool, name) for name in (*required, *optional)}
    separator = literal(", ")
    parts = f" {separator} ".join(names[name] for name in required)
    following = [f"({separator} {names[name]})?" for name in optional]
    if not required and optional:
        # Whichever of the optional arguments comes first has no comma before it.
        firsts = [" ".join((names[name], *following[i + 1 :])) for i, name in enumerate(optional)]
        parts, following = f"({' | '.join(firsts)})?", []
    return rules.add(f"{literal(tool.name + '(')} {parts} {' '.join(following)} {literal(')')}")


def markup_call(rules: Rules, tool: Tool, element: Callable[[str], tuple[str, str]], ends: tuple[str, str]) -> str:
    """A call with an element for each argument: `element` gives its opening and closing tag, `ends` the call's own."""
    required, optional = _arguments(tool)
    parts = [_markup_argument(rules, tool, name, element(name)) for name in required]
    parts += [f"{_markup_argument(rules, tool, name, element(name))}?" for name in optional]
    return rules.add(" ".join((literal(ends[0]), *parts, literal(ends[1]))))


def _arguments(tool: Tool) -> tuple[list[str], list[str]]:
    """The names of the required arguments and of the others."""
    for keyword in tool.parameters:
        if keyword not in _OBJECT_KEYWORDS | _ANNOTATIONS:
            raise GrammarError(f"tool {tool.name}: {keyword!r} cannot be enforced in this format of tool calls")
    listed = tool.parameters.get("required", [])
    required = [name for name in listed if isinstance(name, str)] if isinstance(listed, list | tuple) else []
    for name in required:
        if name not in tool.properties:
            raise GrammarError(f"tool {tool.name}: 'required' names {name!r}, which is not among the properties")
    return required, [name for name in tool.properties if name not in required]


def _python_argument(rules: Rules, tool: Tool, name: str) -> str:
    if not name.isidentifier():
        raise GrammarError(f"tool {tool.name}: {name!r} in 'properties' cannot be the name of an argument in Python")
    return rules.add(f"{literal(name + '=')} {rules.json(_standalone(tool, name))}")


def _markup_argument(rules: Rules, tool: Tool, name: str, tags: tuple[str, str]) -> str:
    if set(name) & set('<>" \n'):
        raise GrammarError(f"tool {tool.name}: {name!r} in 'properties' cannot be the name of an element")
    schema = _standalone(tool, name)
    types = allowed_types(schema, tool.parameters)
    if types and "string" not in types:
        value = f"{rules.json(schema)} {literal(tags[1])}"
    elif texts := _enumerated(schema):
        value = f"({' | '.join(map(literal, texts))}) {literal(tags[1])}"
    else:
        _check_text(tool, schema)
        value = rules.text_before(tags[1])
    return rules.add(f"{literal(tags[0])} {value}")


def _standalone(tool: Tool, name: str) -> Mapping[str, object]:
    """The schema of an argument, with the definitions that it may refer to."""
    schema = tool.properties[name]
    definitions = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return {**definitions, **schema} if isinstance(schema, Mapping) else definitions


def _enumerated(schema: Mapping[str, object]) -> list[str]:
    """The texts that a schema lists, if it lists nothing else."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    texts = [value for value in values if isinstance(value, str)] if isinstance(values, Sequence) else []
    return texts if isinstance(values, Sequence) and len(texts) == len(values) else []


def _check_text(tool: Tool, schema: Mapping[str, object]) -> None:
    for keyword in schema:
        if keyword not in _TEXT_KEYWORDS | _ANNOTATIONS:
            raise GrammarError(f"tool {tool.name}: {keyword!r} of a string cannot be enforced in this format")

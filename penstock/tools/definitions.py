"""Reads callers' tools, of any of the common shapes, into one record, and their `tool_choice`.

OpenAI's chat and responses shapes, Anthropic's shape, and a name with parameters as a plain mapping of types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from penstock.errors import RequestError, concerning, shown

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}
_SCHEMA_KEYS = frozenset({"type", "properties", "$ref", "anyOf", "oneOf", "allOf", "$defs", "additionalProperties"})
_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_MODES: Mapping[object, Literal["none", "auto", "required"]] = {
    "none": "none",
    "auto": "auto",
    "required": "required",
    "any": "required",
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(default_factory=lambda: dict(_NO_PARAMETERS))

    @property
    def properties(self) -> Mapping[str, object]:
        """The schema of each argument, by name."""
        properties = self.parameters.get("properties")
        return properties if isinstance(properties, Mapping) else {}

    def to_dict(self) -> dict[str, object]:
        """The tool in the shape of OpenAI's chat API, which chat templates expect."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call tools; with mode "named", the one that it must call."""

    mode: Literal["none", "auto", "required", "named"] = "auto"
    name: str | None = None


@concerning("tools")
def read_tools(tools: object, *, max_tools: int = MAX_TOOLS, place: str = "tools") -> list[Tool]:
    """The tools as records. Raises `RequestError` that names the place of what is wrong; `place` begins it."""
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"{place} must be a list of tools, not {shown(tools)}")
    if len(tools) > max_tools:
        raise RequestError(f"{place} has {len(tools)} tools; at most {max_tools} are allowed")
    records = [tool if isinstance(tool, Tool) else _tool(tool, f"{place}[{i}]") for i, tool in enumerate(tools)]
    names: set[str] = set()
    for i, tool in enumerate(records):
        if tool.name in names:
            raise RequestError(f"{place}[{i}].name: {shown(tool.name)} is the name of two tools")
        names.add(tool.name)
    return records


@concerning("tool_choice")
def read_tool_choice(choice: object, tools: Sequence[Tool], *, place: str = "tool_choice") -> ToolChoice:
    """The choice as a record, from a word or from the objects of OpenAI's and Anthropic's APIs."""
    if isinstance(choice, ToolChoice):
        return choice
    if choice is None:
        return ToolChoice("auto")
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    mode = _MODES.get(kind) if isinstance(kind, str) else None
    if mode == "required" and not tools:
        raise RequestError(f"{place} requires a call, but there are no tools")
    if mode is not None:
        return ToolChoice(mode)
    if not isinstance(choice, Mapping) or kind not in ("function", "tool"):
        raise RequestError(f'{place} must be "none", "auto", "required" or the name of a function, not {shown(choice)}')
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    if name not in [tool.name for tool in tools]:
        raise RequestError(f"{place} names {shown(name)}, which is not among the tools")
    return ToolChoice("named", str(name))


def _tool(tool: object, place: str) -> Tool:
    if not isinstance(tool, Mapping):
        raise RequestError(f"{place} must be an object with a name and parameters, not {shown(tool)}")
    kind = tool.get("type", "function")
    if kind not in ("function", "custom") or (kind == "custom" and "input_schema" not in tool):
        raise RequestError(f'{place}.type: only "function" is supported, not {shown(kind)}')
    if "function" in tool:
        place += ".function"
        tool = tool["function"]
        if not isinstance(tool, Mapping):
            raise RequestError(f"{place} must be an object, not {shown(tool)}")
    description = tool.get("description")
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{place}.description must be a string, not {shown(description)}")
    key = "input_schema" if "input_schema" in tool else "parameters"
    return Tool(_name(tool.get("name"), f"{place}.name"), description or "", _schema(tool.get(key), f"{place}.{key}"))


def _name(name: object, place: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{place} must be 1 to 64 letters, digits, underscores or hyphens, not {shown(name)}")
    return str(name)


def _schema(schema: object, place: str) -> dict[str, object]:
    """The schema of a tool's arguments; {"query": "string"} is short for an object with this property."""
    if schema is None:
        return dict(_NO_PARAMETERS)
    if not isinstance(schema, Mapping) or not all(isinstance(key, str) for key in schema):
        raise RequestError(f"{place} must be a JSON schema, not {shown(schema)}")
    if not schema:
        return dict(_NO_PARAMETERS)
    if not _SCHEMA_KEYS & schema.keys():
        return _full_schema(schema, place)
    if schema.get("type", "object") != "object":
        raise RequestError(f'{place}.type must be "object", not {shown(schema["type"])}')
    if not isinstance(schema.get("properties", {}), Mapping):
        raise RequestError(f"{place}.properties must be an object, not {shown(schema['properties'])}")
    return {"type": "object", **schema}


def _full_schema(short: Mapping[str, object], place: str) -> dict[str, object]:
    properties = {}
    for key, value in short.items():
        if isinstance(value, str) and value in _TYPES:
            properties[key] = {"type": value}
        elif isinstance(value, Mapping):
            properties[key] = dict(value)
        else:
            raise RequestError(f"{place}.{key} must be a type ({', '.join(sorted(_TYPES))}), not {shown(value)}")
    return {"type": "object", "properties": properties, "required": list(properties)}

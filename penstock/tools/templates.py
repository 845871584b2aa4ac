"""Which formats a model uses, by its chat template; and instructions for models whose template knows no tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from penstock.tools.definitions import Tool
from penstock.tools.output_parser import format_named

# The first whose text occurs in a template decides.
_TOOL_SIGNS: tuple[tuple[str, str], ...] = (
    ("[TOOL_CALLS]", "mistral"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("<function_calls>", "xml"),
    ("<|python_tag|>", "llama3"),
    ("func_name1(", "pythonic"),
    ('"parameters": dictionary of argument name', "llama3"),
)
_REASONING_SIGNS: tuple[tuple[str, str], ...] = (
    ("[THINK]", "mistral"),
    ("<think>", "qwen3"),
    ("</think>", "qwen3"),
    ("<thinking>", "thinking"),
    ("<reasoning>", "reasoning"),
    ("Here is my thought process:", "granite"),
)
_EXAMPLES: Mapping[str, str] = {
    "json": '{"name": "FUNCTION", "arguments": {"ARGUMENT": VALUE}}',
    "llama3": '{"name": "FUNCTION", "parameters": {"ARGUMENT": VALUE}}',
    "hermes": '<tool_call>\n{"name": "FUNCTION", "arguments": {"ARGUMENT": VALUE}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "FUNCTION", "arguments": {"ARGUMENT": VALUE}}]',
    "xml": '<function_calls>\n<invoke name="FUNCTION">\n<parameter name="ARGUMENT">VALUE</parameter>\n</invoke>\n'
    "</function_calls>",
    "qwen3_coder": "<tool_call>\n<function=FUNCTION>\n<parameter=ARGUMENT>\nVALUE\n</parameter>\n</function>\n"
    "</tool_call>",
    "function": "FUNCTION(ARGUMENT=VALUE)",
    "pythonic": "[FUNCTION(ARGUMENT=VALUE)]",
}


def tool_format_of(template: str | None) -> str:
    """The format of the calls that a chat template renders; "json" if it renders none that is known."""
    return _sign_in(template, _TOOL_SIGNS) or "json"


def reasoning_format_of(template: str | None) -> str | None:
    """The name of the reasoning format whose markers a chat template contains, or None."""
    return _sign_in(template, _REASONING_SIGNS)


def renders_tools(template: str | None) -> bool:
    """Whether a chat template has a place for tools. If not, put `tool_instructions` into the system message."""
    return re.search(r"\btools\b", template or "") is not None


def tool_instructions(tools: Sequence[Tool], format: str) -> str:
    """The tools, and how to call them in this format, as text for a system message."""
    example = _EXAMPLES[format_named(format).name]
    functions = "\n".join(json.dumps(tool.to_dict()["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You may call these functions, each given with the JSON schema of its arguments:\n{functions}\n\n"
        f"To call a function, answer with its name and arguments in exactly this form:\n{example}"
    )


def _sign_in(template: str | None, signs: tuple[tuple[str, str], ...]) -> str | None:
    return next((name for sign, name in signs if template and sign in template), None)

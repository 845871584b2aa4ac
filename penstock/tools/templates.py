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


# What stands for the arguments in an example: JSON, or a text for each of them.
_JSON_ARGUMENTS = '{"ARGUMENT": VALUE}'
_ARGUMENT = re.compile(r'<parameter name="ARGUMENT">VALUE</parameter>\n|<parameter=ARGUMENT>\nVALUE\n</parameter>\n')


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


def renders_calls(template: str | None) -> bool:
    """Whether a chat template renders earlier calls. If not, write them into the assistant's text with `call_text`."""
    return "tool_calls" in (template or "")


def call_text(name: str, arguments: Mapping[str, object], format: str) -> str:
    """A call as a model writes it in this format."""
    example = _EXAMPLES[format_named(format).name].replace("FUNCTION", name, 1)
    if _JSON_ARGUMENTS in example:
        return example.replace(_JSON_ARGUMENTS, json.dumps(arguments, ensure_ascii=False))
    if (argument := _ARGUMENT.search(example)) is None:
        return example.replace("ARGUMENT=VALUE", ", ".join(f"{key}={value!r}" for key, value in arguments.items()))
    filled = (
        argument[0].replace("VALUE", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for value in arguments.values()
    )
    texts = (text.replace("ARGUMENT", key, 1) for key, text in zip(arguments, filled, strict=True))
    return example.replace(argument[0], "".join(texts))


def _sign_in(template: str | None, signs: tuple[tuple[str, str], ...]) -> str | None:
    return next((name for sign, name in signs if template and sign in template), None)

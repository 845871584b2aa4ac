"""`constraint`: what `tool_choice` demands of an output, as a grammar in the model's own format of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from penstock.structured_outputs import StructuredOutputs
from penstock.tools.definitions import Tool, read_tool_choice
from penstock.tools.grammars import Rules, json_call, literal, markup_call, python_call, repeated
from penstock.tools.output_parser import format_named

# (rules, tools, parallel, how to write a marker) -> the body of the start rule.
_Builder = Callable[[Rules, Sequence[Tool], bool, Callable[[str], str]], str]


def constraint(
    tools: Sequence[Tool],
    tool_choice: object,
    format: str,
    parallel: bool = True,
    *,
    special_tokens: Mapping[str, int] | None = None,
) -> StructuredOutputs | None:
    """The structure of an output that calls what `tool_choice` requires, and nothing else; None for "auto" and "none".

    "required" admits one call of any tool, with `parallel` several; a named function is called once. `special_tokens`
    are the ids of markers that the tokenizer has as special tokens (see `Format.special_tokens`). Raises `RequestError`
    for a choice that is not among the tools, and `GrammarError` if a schema cannot be enforced in this format. Schemas
    are compiled when the request is admitted.
    """
    choice = read_tool_choice(tool_choice, tools)
    if choice.mode in ("none", "auto"):
        return None
    if choice.mode == "named":
        tools, parallel = [tool for tool in tools if tool.name == choice.name], False

    def marker(text: str) -> str:
        token = (special_tokens or {}).get(text)
        return literal(text) if token is None else f"<[{token}]>"

    rules = Rules()
    start = _BUILDERS[format_named(format).name](rules, tools, parallel, marker)
    return StructuredOutputs(grammar="\n".join([f"start: {start}", *rules.lines, ""]))


def _any(rules: Rules, names: Sequence[str]) -> str:
    return rules.add(" | ".join(names))


def _json(rules: Rules, tools: Sequence[Tool], parallel: bool, marker: Callable[[str], str]) -> str:
    calls = _any(rules, [json_call(rules, tool) for tool in tools])
    return f'{calls} | "[" {repeated(calls, ", ", True)} "]"' if parallel else calls


def _llama3(rules: Rules, tools: Sequence[Tool], parallel: bool, marker: Callable[[str], str]) -> str:
    return repeated(_any(rules, [json_call(rules, tool, "parameters") for tool in tools]), "; ", parallel)


def _mistral(rules: Rules, tools: Sequence[Tool], parallel: bool, marker: Callable[[str], str]) -> str:
    calls = _any(rules, [json_call(rules, tool) for tool in tools])
    return f'{marker("[TOOL_CALLS]")} "[" {repeated(calls, ", ", parallel)} "]"'


def _hermes(rules: Rules, tools: Sequence[Tool], parallel: bool, marker: Callable[[str], str]) -> str:
    calls = _any(rules, [json_call(rules, tool) for tool in tools])
    call = rules.add(f"{literal('<tool_call>' + chr(10))} {calls} {literal(chr(10) + '</tool_call>')}")
    return repeated(call, "\n", parallel)


def _xml(rules: Rules, tools: Sequence[Tool], parallel: bool, marker: Callable[[str], str]) -> str:
    calls = _any(
        rules,
        [markup_call(rules, tool, _xml_element, (f'<invoke name="{tool.name}">\n', "</invoke>\n")) for tool in tools],
    )
    body = f"{calls}+" if parallel else calls
    return f"{literal('<function_calls>' + chr(10))} {body} {literal('</function_calls>')}"


def _xml_element(name: str) -> tuple[str, str]:
    return f'<parameter name="{name}">', "</parameter>\n"


def _qwen3_coder(rules: Rules, tools: Sequence[Tool], parallel: bool, marker: Callable[[str], str]) -> str:
    calls = _any(
        rules,
        [
            markup_call(
                rules,
                tool,
                _qwen3_coder_element,
                (f"<tool_call>\n<function={tool.name}>\n", "</function>\n</tool_call>"),
            )
            for tool in tools
        ],
    )
    return repeated(calls, "\n", parallel)


def _qwen3_coder_element(name: str) -> tuple[str, str]:
    return f"<parameter={name}>\n", "\n</parameter>\n"


def _function(rules: Rules, tools: Sequence[Tool], parallel: bool, marker: Callable[[str], str]) -> str:
    return repeated(_any(rules, [python_call(rules, tool) for tool in tools]), "\n", parallel)


def _pythonic(rules: Rules, tools: Sequence[Tool], parallel: bool, marker: Callable[[str], str]) -> str:
    return f'"[" {repeated(_any(rules, [python_call(rules, tool) for tool in tools]), ", ", parallel)} "]"'


_BUILDERS: Mapping[str, _Builder] = {
    "json": _json,
    "llama3": _llama3,
    "mistral": _mistral,
    "hermes": _hermes,
    "xml": _xml,
    "qwen3_coder": _qwen3_coder,
    "function": _function,
    "pythonic": _pythonic,
}

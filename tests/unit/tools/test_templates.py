"""A chat template tells the formats of calls and of reasoning."""

from __future__ import annotations

from pathlib import Path

import pytest

import penstock
from penstock.tools import (
    FORMATS,
    call_text,
    parse_output,
    reasoning_format_of,
    renders_calls,
    renders_tools,
    tool_format_of,
    tool_instructions,
)
from tests.unit.tools.texts import TOOLS

QWEN3 = """{%- if tools %}For each function call, return a json object within <tool_call></tool_call> XML tags:
<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{%- endif %}
{{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}"""
QWEN3_CODER = """{%- if tools %}<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>
value_1\n</parameter>\n</function>\n</tool_call>{%- endif %}"""
LLAMA3 = """{%- if builtin_tools is defined %}{{- "<|python_tag|>" + tool_call.name + ".call(" }}{%- endif %}
{%- if tools is not none %}Respond in the format {"name": function name, "parameters": dictionary of argument name and
its value}.{%- endif %}"""
LLAMA32_PYTHONIC = """{%- if tools is not none %}You MUST put it in the format of
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]{%- endif %}"""
MISTRAL = """{%- if tools is defined %}[AVAILABLE_TOOLS] {{ tools }}[/AVAILABLE_TOOLS]{%- endif %}[TOOL_CALLS] ["""
MAGISTRAL = MISTRAL + "[THINK]Here, you draft[/THINK]"
GRANITE = "{%- if thinking %}Write after 'Here is my thought process:' and 'Here is my response:'{%- endif %}"
DEMO = (Path(penstock.__file__).parent / "demo" / "model" / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("template", "tools", "reasoning", "has_tools"),
    [
        (QWEN3, "hermes", "qwen3", True),
        (QWEN3_CODER, "qwen3_coder", None, True),
        (LLAMA3, "llama3", None, True),
        (LLAMA32_PYTHONIC, "pythonic", None, True),
        (MISTRAL, "mistral", None, True),
        (MAGISTRAL, "mistral", "mistral", True),
        (GRANITE, "json", "granite", False),
        (DEMO, "json", None, False),
        ("", "json", None, False),
        (None, "json", None, False),
    ],
)
def test_a_template_tells_its_formats(template: str | None, tools: str, reasoning: str | None, has_tools: bool) -> None:
    assert tool_format_of(template) == tools
    assert reasoning_format_of(template) == reasoning
    assert renders_tools(template) is has_tools


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_instructions_show_the_format_that_is_parsed(name: str) -> None:
    """A model that follows its instructions to the letter is understood, whatever the format."""
    text = tool_instructions(TOOLS, name)
    assert '"name": "search"' in text
    example = text.split("exactly this form:\n")[1].replace("FUNCTION", "search")
    example = example.replace("ARGUMENT", "n").replace("VALUE", "5")
    (call,) = parse_output(example, name, TOOLS).tool_calls
    assert (call.name, call.arguments) == ("search", {"n": 5})


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("arguments", [{}, {"n": 5}, {"query": 'ARGUMENT "é" VALUE', "n": 5}])
def test_the_text_of_a_call_is_read_as_that_call(name: str, arguments: dict[str, object]) -> None:
    (call,) = parse_output(call_text("search", arguments, name), name, TOOLS).tool_calls
    assert (call.name, call.arguments) == ("search", arguments)


def test_a_template_tells_whether_it_renders_earlier_calls() -> None:
    assert renders_calls("{% for call in message.tool_calls %}{{ call.function.name }}{% endfor %}")
    assert not renders_calls("{{ message.content }}")
    assert not renders_calls(None)

"""Outputs in which a model fails to call a tool: what it wrote, in which format, and the attempts that it made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """An output; `attempts` are (status, name) in order, if the model stopped by itself."""

    format: str
    text: str
    attempts: tuple[tuple[str, str | None], ...]


COMPLETE = '<tool_call>\n{"name": "search", "arguments": {"query": "tea"}}\n</tool_call>'
BAD, GOOD = ("malformed", None), ("complete", "search")
BAD_SEARCH = ("malformed", "search")

FAILURES = [
    # Hermes: JSON between markers.
    Failure("hermes", "I know the answer: 4.", ()),
    Failure("hermes", COMPLETE, (GOOD,)),
    Failure("hermes", f"{COMPLETE}\n{COMPLETE}", (GOOD, GOOD)),
    Failure("hermes", "<tool_call>", (BAD,)),
    Failure("hermes", "<tool_call></tool_call>", (BAD,)),
    Failure("hermes", "<tool_call>search tea</tool_call>", (BAD,)),
    Failure("hermes", "<tool_call>\n{name: search}\n</tool_call> Sorry.", (BAD,)),
    Failure("hermes", "<tool_call>\n{'name': 'search', 'arguments': {}}\n</tool_call>", (BAD,)),
    Failure("hermes", '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>', (BAD,)),
    Failure("hermes", '<tool_call>\n{"name": "search", "arguments": {"query": "tea}\n</tool_call>', (BAD_SEARCH,)),
    Failure("hermes", '<tool_call>\n{"name": "search", "arguments": {"query": tea}}\n</tool_call>', (BAD_SEARCH,)),
    Failure("hermes", '<tool_call>\n{"name": "search", "arguments": [1, 2', (BAD,)),
    Failure("hermes", f"<tool_call>oops</tool_call>\n{COMPLETE}", (BAD, GOOD)),
    Failure("hermes", f"{COMPLETE}\n<tool_call>oops</tool_call>", (GOOD, BAD)),
    Failure("hermes", f"{COMPLETE}\n<tool_call>oops\n{COMPLETE}\n", (GOOD, BAD, GOOD)),
    Failure("hermes", f"<tool_call><tool_call>{COMPLETE}", (BAD, GOOD)),
    Failure("hermes", '<tool_call>{"name": "search", "arguments": {"query": "t\\ud83d"}}</tool_call>', (GOOD,)),
    # The other formats with markers.
    Failure("qwen3_coder", "<tool_call>\n<function=search>\n<parameter=query>\ntea", (BAD_SEARCH,)),
    Failure("qwen3_coder", "<tool_call>\n<function=>\n</function>\n</tool_call>", (BAD,)),
    Failure("xml", '<function_calls>\n<invoke name="search">\n<parameter name="query">tea', (BAD_SEARCH,)),
    Failure("xml", "<function_calls>\n<invoke>\n</invoke>\n</function_calls>", (BAD,)),
    Failure("xml", '<function_calls>\n<invoke name="search"\n</function_calls>', (BAD,)),
    Failure("mistral", '[TOOL_CALLS] [{"name": "search", "arguments": {"query": ', (BAD_SEARCH,)),
    Failure("mistral", "[TOOL_CALLS]search{", (BAD_SEARCH,)),
    Failure("llama3", '<|python_tag|>{"name": "search", "parameters": {"query": tea}}', (BAD_SEARCH,)),
    Failure("llama3", "<|python_tag|>print(5)", (BAD,)),
    # Without markers only what names a tool is an attempt.
    Failure("json", 'An object: {"a": [1, 2]}', ()),
    Failure("json", '{"name": "search", "arguments": {"query": tea}}', (BAD_SEARCH,)),
    Failure("function", 'Call f(x) with x = 5, or search(query="tea', (BAD_SEARCH,)),
    Failure("pythonic", '[search(query="tea"), search(', (GOOD, BAD_SEARCH)),
]

"""Tools, and texts that call them in every format, for the tests of parsers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from penstock.tools import ContentDelta, OutputParser, Piece, ReasoningDelta, Tool, ToolCallDelta, joined, read_tools

TOOLS: list[Tool] = read_tools(
    [
        {
            "name": "search",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}, "n": {"type": "integer"}, "tags": {"type": "array"}},
            },
        },
        {"name": "stop", "description": "Ends the search."},
    ]
)
# In each format: text, a call of search(query="tea, (green)", n=5, tags=["a", "b"]), a call of stop(), text.
TEXTS: dict[str, str] = {
    "json": 'Let me see.\n```json\n[{"name": "search", "arguments": {"query": "tea, (green)", "n": 5, "tags": ["a", '
    '"b"]}}, {"tool": "stop", "args": {}}]\n```\nDone.',
    "hermes": 'Let me see.\n<tool_call>\n{"name": "search", "arguments": {"query": "tea, (green)", "n": 5, "tags": '
    '["a", "b"]}}\n</tool_call>\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\nDone.',
    "llama3": 'Let me see.\n<|python_tag|>{"name": "search", "parameters": {"query": "tea, (green)", "n": 5, "tags": '
    '["a", "b"]}}; {"name": "stop", "parameters": {}}\nDone.',
    "mistral": 'Let me see.\n[TOOL_CALLS]search[ARGS]{"query": "tea, (green)", "n": 5, "tags": ["a", "b"]}[TOOL_CALLS] '
    '[{"name": "stop", "arguments": {}}]\nDone.',
    "xml": 'Let me see.\n<function_calls>\n<invoke name="search">\n<parameter name="query">tea, (green)</parameter>\n'
    '<parameter name="n">5</parameter>\n<parameter name="tags">["a", "b"]</parameter>\n</invoke>\n<invoke>'
    "<tool_name>stop</tool_name></invoke>\n</function_calls>\nDone.",
    "qwen3_coder": "Let me see.\n<tool_call>\n<function=search>\n<parameter=query>\ntea, (green)\n</parameter>\n"
    '<parameter=n>\n5\n</parameter>\n<parameter=tags>\n["a", "b"]\n</parameter>\n</function>\n</tool_call>\n<tool_call>'
    "\n<function=stop>\n</function>\n</tool_call>\nDone.",
    "function": "Let me see.\nsearch(query=\"tea, (green)\", n=5, tags=['a', 'b']) stop()\nDone.",
    "pythonic": 'Let me see.\n[search(query=\'tea, (green)\', n=5, tags=["a", "b"]), stop()]\nDone.',
}


def fed(parser: OutputParser, parts: Iterable[str]) -> list[Piece]:
    """Every piece that a parser delivers for these parts of a text, neighbours joined."""
    pieces = [piece for part in parts for piece in parser.feed(part)]
    return joined([*pieces, *parser.finish()])


def plain(pieces: Sequence[Piece]) -> list[tuple[object, ...]]:
    """Pieces without the random ids."""
    result: list[tuple[object, ...]] = []
    for piece in pieces:
        if isinstance(piece, ToolCallDelta):
            assert (piece.id is None) == (piece.name is None)
            result.append((piece.index, piece.name, piece.arguments))
        elif isinstance(piece, ContentDelta):
            result.append(("content", piece.text))
        elif isinstance(piece, ReasoningDelta):
            result.append(("reasoning", piece.text))
    return result


def split(text: str, places: Iterable[int]) -> list[str]:
    """The text cut at these places."""
    bounds = [0, *sorted(place for place in places if place <= len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]

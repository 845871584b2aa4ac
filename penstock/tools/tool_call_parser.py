"""`ToolCallParser`: the tool calls in a whole text."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.tools.definitions import read_tools
from penstock.tools.output_parser import format_named, parse_output
from penstock.tools.pieces import ToolCall


class ToolCallParser:
    """Finds the complete calls in a text. For streams, content and reasoning there is `OutputParser`.

    `format` is a name in `penstock.tools.FORMATS`. `tools` are read by `read_tools`: with them, arguments that are
    plain text are converted by schema, and JSON or Python without a marker counts as a call only for a known name.
    Malformed calls are left out; nothing that a model writes raises.
    """

    def __init__(self, format: str = "json", tools: object = None) -> None:
        self.format = format_named(format).name
        self.tools = read_tools(tools)

    def parse(self, text: str) -> list[ToolCall]:
        """The calls in the order of the text."""
        output = parse_output(text, self.format, self.tools, hold_calls=True)
        return [call for call in output.tool_calls if call.is_complete]

    @staticmethod
    def parse_json_tool_calls(text: str, tools: Sequence[object] | None = None) -> list[ToolCall]:
        """Calls as JSON, bare or in a fence."""
        return ToolCallParser("json", tools).parse(text)

    @staticmethod
    def parse_xml_tool_calls(text: str, tools: Sequence[object] | None = None) -> list[ToolCall]:
        """Calls as markup in either of Anthropic's styles."""
        return ToolCallParser("xml", tools).parse(text)

    @staticmethod
    def parse_function_style_calls(text: str, tools: Sequence[object] | None = None) -> list[ToolCall]:
        """Calls of the given tools as Python, such as `search(query="tea", max_results=5)`. Without tools, none."""
        return ToolCallParser("function", tools).parse(text)

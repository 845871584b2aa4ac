"""Tool calls and reasoning in what a model writes: parsers for streams and whole texts, and grammars that force a call.

Pure Python over strings, without an engine or a server; only `Conversation` uses an engine, through its protocols.
`docs/tools.md` shows how the parts fit together.
"""

from penstock.tools.attempts import ToolAttempt, read_attempts
from penstock.tools.constraint import constraint
from penstock.tools.conversation import Conversation
from penstock.tools.definitions import MAX_TOOLS, Tool, ToolChoice, read_tool_choice, read_tools
from penstock.tools.output_parser import FORMATS, OutputParser, format_named, parse_output
from penstock.tools.pieces import (
    ContentDelta,
    ParsedOutput,
    Piece,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
    joined,
    random_id,
)
from penstock.tools.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningSplitter, reasoning_format_named
from penstock.tools.templates import (
    call_text,
    reasoning_format_of,
    renders_calls,
    renders_tools,
    tool_format_of,
    tool_instructions,
)
from penstock.tools.tool_call_parser import ToolCallParser
from penstock.tools.turns import TemplateFork, TokenRecord, Turn, TurnPrompt

__all__ = [
    "FORMATS",
    "MAX_TOOLS",
    "REASONING_FORMATS",
    "ContentDelta",
    "Conversation",
    "OutputParser",
    "ParsedOutput",
    "Piece",
    "ReasoningDelta",
    "ReasoningFormat",
    "ReasoningSplitter",
    "TemplateFork",
    "TokenRecord",
    "Tool",
    "ToolAttempt",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallParser",
    "ToolChoice",
    "Turn",
    "TurnPrompt",
    "call_text",
    "constraint",
    "format_named",
    "joined",
    "parse_output",
    "random_id",
    "read_attempts",
    "read_tool_choice",
    "read_tools",
    "reasoning_format_named",
    "reasoning_format_of",
    "renders_calls",
    "renders_tools",
    "tool_format_of",
    "tool_instructions",
]

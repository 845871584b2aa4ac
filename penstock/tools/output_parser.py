"""Splits what a model writes into reasoning, content and tool calls, piece by piece or all at once.

One parser reads one output, and does the same whether the text comes in one piece or in many. Its time is linear in the
length of the text: after `MAX_BLOCKS` places where calls seemed to begin, the rest of the text is content.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from penstock.errors import RequestError, shown
from penstock.tools.calls import MAX_CALLS, CallCollector
from penstock.tools.cursor import Cursor, EndOfText, Malformed, Reading
from penstock.tools.definitions import Tool
from penstock.tools.formats.block import Block, Format
from penstock.tools.formats.json_calls import HERMES, JSON, LLAMA3, MISTRAL
from penstock.tools.formats.markup import QWEN3_CODER, XML
from penstock.tools.formats.python_calls import FUNCTION, PYTHONIC
from penstock.tools.pieces import ContentDelta, ParsedOutput, Piece, ReasoningDelta, ToolCall, joined
from penstock.tools.reasoning import ReasoningSplitter

FORMATS = {format.name: format for format in (JSON, XML, FUNCTION, HERMES, QWEN3_CODER, LLAMA3, MISTRAL, PYTHONIC)} | {
    "qwen": HERMES
}
MAX_BLOCKS = 2048


def format_named(name: str) -> Format:
    """The format of this name. Raises `RequestError` for an unknown one."""
    if not isinstance(name, str) or name not in FORMATS:
        raise RequestError(f"unknown tool call format {shown(name)}: choose one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


class OutputParser:
    """Reads one output: `feed` every piece of text, then `finish` once.

    `format` is a name in `FORMATS`, or None if no tools may be called; `reasoning` splits off the model's reasoning.
    With `hold_calls` a call is delivered when it is complete, and a malformed one is content. Without, its arguments
    are delivered as they arrive, and a call whose arguments turn out malformed ends there.
    """

    def __init__(
        self,
        format: str | None = None,
        tools: Sequence[Tool] = (),
        *,
        reasoning: ReasoningSplitter | None = None,
        hold_calls: bool = False,
    ) -> None:
        self._format = None if format is None else format_named(format)
        self._tools = {tool.name: tool for tool in tools}
        self._reasoning = reasoning
        self._cursor = Cursor()
        self._calls = CallCollector(self._cursor, self._format.new_id if self._format else str, hold_calls)
        self._reader = self._read()
        self._content: list[str] = []
        self._is_holding = False

    @property
    def is_holding(self) -> bool:
        """Whether text was fed that may still become part of a call or a marker, so that nothing was delivered."""
        return self._is_holding

    def feed(self, text: str) -> list[Piece]:
        """What the text completes, in order."""
        if not text:
            return []
        pieces = self._split(self._reasoning.feed(text) if self._reasoning else [ContentDelta(text)])
        self._is_holding = not pieces or self._cursor.has_unread
        return pieces

    def finish(self) -> list[Piece]:
        """What remains: held text, and what arrived of a call that the end of the text cuts off."""
        pieces = self._split(self._reasoning.finish() if self._reasoning else [])
        self._cursor.closed = True
        self._advance()
        self._is_holding = False
        return joined([*pieces, *self._calls.take()])

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Every call so far, with its place in the content: the text behind the reasoning."""
        return self._calls.tool_calls("".join(self._content))

    def _split(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Replace content by the content and the calls in it."""
        result: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, ContentDelta) and self._format is not None:
                self._content.append(piece.text)
                self._cursor.feed(piece.text)
                self._advance()
                result += self._calls.take()
            else:
                result.append(piece)
        return joined(result)

    def _advance(self) -> None:
        """Run the reader until it needs more text."""
        next(self._reader, None)

    def _read(self) -> Reading[None]:
        """The whole text: content, and blocks of calls."""
        try:
            yield from self._read_blocks()
        except EndOfText:
            self._calls.cut()
            return
        while True:
            self._calls.content(self._cursor.rest())
            if self._cursor.closed:
                self._calls.cut()
                return
            yield

    def _read_blocks(self) -> Reading[None]:
        if self._format is None:
            return
        marker = self._format.marker(tuple(self._tools))
        num_blocks = 0
        while num_blocks < MAX_BLOCKS and self._calls.num_calls < MAX_CALLS:
            text, opening = yield from self._cursor.until(marker)
            self._calls.content(text)
            if opening is not None:
                num_blocks += 1
                yield from self._read_block(self._format, opening)

    def _read_block(self, format: Format, opening: str) -> Reading[None]:
        self._calls.start(opening)
        block = Block(self._cursor, self._calls, self._tools, opening)
        with suppress(Malformed):
            yield from format.read(block)
        self._calls.reject()


def parse_output(
    text: str,
    format: str | None = None,
    tools: Sequence[Tool] = (),
    *,
    reasoning: ReasoningSplitter | None = None,
    hold_calls: bool = False,
) -> ParsedOutput:
    """A whole output, split as a stream of it would be."""
    parser = OutputParser(format, tools, reasoning=reasoning, hold_calls=hold_calls)
    pieces = parser.feed(text) + parser.finish()
    content = "".join(piece.text for piece in pieces if isinstance(piece, ContentDelta))
    thought = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta))
    return ParsedOutput(content, thought, parser.tool_calls())

"""Splits a model's reasoning from its answer, by the markers that the model writes around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.errors import RequestError, shown
from penstock.tools.cursor import Cursor, EndOfText, Marker, Reading
from penstock.tools.pieces import ContentDelta, Piece, ReasoningDelta, joined


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The markers around reasoning. `end` is what `SamplingParams.reasoning_end` takes."""

    name: str
    start: str
    end: str

    def is_open_after(self, prompt: str, continued: str = "") -> bool:
        """Whether the output begins inside the reasoning, after this rendered prompt (its end suffices).

        True if the prompt ends with the start marker, as templates do that begin the reasoning. `continued` is the
        text of an assistant message that the prompt ends with and the model continues.
        """
        if continued.strip():
            return continued.rfind(self.start) > continued.rfind(self.end)
        return prompt.rstrip().endswith(self.start)


_THINK = ("<think>", "</think>")
REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    name: ReasoningFormat(name, start, end)
    for name, (start, end) in {
        "deepseek_r1": _THINK,
        "qwen3": _THINK,
        "thinking": ("<thinking>", "</thinking>"),
        "reasoning": ("<reasoning>", "</reasoning>"),
        "mistral": ("[THINK]", "[/THINK]"),
        "granite": ("Here is my thought process:", "Here is my response:"),
    }.items()
}


def reasoning_format_named(name: str) -> ReasoningFormat:
    """The format of this name. Raises `RequestError` for an unknown one."""
    if not isinstance(name, str) or name not in REASONING_FORMATS:
        names = ", ".join(sorted(REASONING_FORMATS))
        raise RequestError(f"unknown reasoning format {shown(name)}: choose one of {names}")
    return REASONING_FORMATS[name]


class ReasoningSplitter:
    """Reads one output: `feed` every piece of text, then `finish` once.

    `is_open` says that the prompt began the reasoning already (see `ReasoningFormat.is_open_after`). Otherwise there is
    reasoning only if the output begins with the start marker. White space inside the markers and behind the
    reasoning is dropped.
    """

    def __init__(self, format: ReasoningFormat, *, is_open: bool = False) -> None:
        self._format = format
        self._is_open = is_open
        self._cursor = Cursor()
        self._pieces: list[Piece] = []
        self._reader = self._read()

    def feed(self, text: str) -> list[Piece]:
        """What the text completes, in order."""
        self._cursor.feed(text)
        next(self._reader, None)
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held."""
        self._cursor.closed = True
        next(self._reader, None)
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return joined(pieces)

    def _read(self) -> Reading[None]:
        try:
            if (yield from self._starts()) or self._is_open:
                yield from self._read_reasoning()
        except EndOfText:
            return
        while True:
            if self._cursor.has_unread:
                self._pieces.append(ContentDelta(self._cursor.rest()))
            yield

    def _starts(self) -> Reading[bool]:
        """Read white space and the start marker, if the output begins with it."""
        cursor = self._cursor
        cursor.mark()
        try:
            yield from cursor.spaces()
            if (yield from cursor.choice(self._format.start)):
                return True
        except EndOfText:
            pass
        if not self._is_open and (spaces := cursor.marked()):
            self._pieces.append(ContentDelta(spaces))
        return False

    def _read_reasoning(self) -> Reading[None]:
        """Read the reasoning, its end, and the white space around both."""
        cursor, end = self._cursor, Marker.literals(self._format.end)
        cursor.unmark()
        yield from cursor.spaces()
        marker, spaces = None, list[str]()
        while marker is None:
            try:
                text, marker = yield from cursor.until(end)
            except EndOfText:
                self._pieces.append(ReasoningDelta("".join(spaces) + cursor.rest()))
                raise
            if stripped := text.rstrip():
                self._pieces.append(ReasoningDelta("".join(spaces) + stripped))
                spaces = []
            spaces.append(text[len(stripped) :])
        yield from cursor.spaces()

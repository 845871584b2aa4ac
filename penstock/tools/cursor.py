"""The text that a parser reads: a buffer that grows, a position in it, and readers that wait for more.

A reader is a generator that yields while it needs more text, so one parser serves streams and whole texts. A reader
decides by the text alone, never by how the text arrived: it waits until its answer cannot change.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

_SPACES = re.compile(r"\s*+")


class Malformed(Exception):
    """The text is not a tool call after all. Never leaves this package."""


class EndOfText(Exception):
    """The text ends inside something. Never leaves this package."""


class Marker:
    """What may begin or end a part of a text: a pattern, and a pattern of every beginning of it.

    `partial` is tried on the last `window` characters only, so no match of `pattern` may be longer.
    """

    def __init__(self, pattern: str, partial: str, window: int) -> None:
        self._source = pattern
        self.partial = partial
        self._window = window

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The pattern, compiled on first use: importing the package must stay quick."""
        return re.compile(self._source)

    @cached_property
    def _partial(self) -> re.Pattern[str]:
        return re.compile(rf"(?:{self.partial})\Z")

    @classmethod
    def literals(cls, *texts: str) -> Marker:
        """Any of these texts."""
        pattern = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
        return cls(pattern, "|".join(map(beginnings, texts)), max(map(len, texts)))

    def held(self, text: str, pos: int) -> int:
        """Where the end of `text` may begin a marker, else its length."""
        match = self._partial.search(text, max(pos, len(text) - self._window))
        return match.start() if match else len(text)


def beginnings(text: str) -> str:
    """A pattern of every non-empty beginning of `text`, the longest first."""
    pattern = ""
    for character in reversed(text):
        pattern = re.escape(character) + (f"(?:{pattern})?" if pattern else "")
    return pattern


class Cursor:
    """A position in a text that arrives piece by piece. Consumed text is dropped, except what `mark` asks to keep."""

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.closed = False
        self._offset = 0  # of the buffer in the whole text
        self._mark: int | None = None  # in the buffer; negative if part of the marked text is in `_marked`
        self._marked: list[str] = []

    @property
    def position(self) -> int:
        """The number of characters consumed so far."""
        return self._offset + self.pos

    @property
    def has_unread(self) -> bool:
        """Whether text arrived that is not consumed yet."""
        return self.pos < len(self.text)

    @property
    def is_marked(self) -> bool:
        """Whether consumed text is kept."""
        return self._mark is not None

    def feed(self, text: str) -> None:
        """Append text. One consumed character stays in the buffer, for patterns that look behind."""
        start = max(self.pos - 1, 0)
        if self._mark is not None:
            self._marked.append(self.text[self._mark : self.pos])
            self._mark = self.pos - start
        self.text = self.text[start:] + text
        self._offset += start
        self.pos -= start

    def mark(self) -> None:
        """Keep what is consumed from here on, for `marked`."""
        self._mark = self.pos
        self._marked = []

    def unmark(self) -> None:
        """Keep consumed text no longer."""
        self._mark = None
        self._marked = []

    def marked(self) -> str:
        """What was consumed since `mark`."""
        if self._mark is None:
            return ""
        return "".join(self._marked) + self.text[self._mark : self.pos]

    def rest(self) -> str:
        """Consume all that arrived."""
        text, self.pos = self.text[self.pos :], len(self.text)
        return text

    def more(self) -> Reading[None]:
        """Wait for more text. Raises `EndOfText` if there is none."""
        if self.closed:
            raise EndOfText
        yield

    def spaces(self) -> Reading[None]:
        """Consume white space. Raises `EndOfText` if nothing follows."""
        while True:
            match = _SPACES.match(self.text, self.pos)
            assert match
            self.pos = match.end()
            if self.has_unread:
                return
            yield from self.more()

    def peek(self) -> Reading[str]:
        """The next character, which is not consumed."""
        while not self.has_unread:
            yield from self.more()
        return self.text[self.pos]

    def choice(self, *literals: str) -> Reading[str | None]:
        """Consume and return the first literal that the text goes on with, or return None and consume nothing."""
        for literal in literals:
            while literal.startswith(self.text[self.pos : self.pos + len(literal)]):
                if self.text.startswith(literal, self.pos):
                    self.pos += len(literal)
                    return literal
                if self.closed:
                    break
                yield
        return None

    def literal(self, *literals: str) -> Reading[str]:
        """Consume and return one of the literals. Raises `Malformed` if the text goes on otherwise."""
        literal = yield from self.choice(*literals)
        if literal is None:
            rest = self.text[self.pos : self.pos + max(map(len, literals))]
            raise EndOfText if any(text.startswith(rest) for text in literals) else Malformed
        return literal

    def closing(self, literal: str) -> Reading[bool]:
        """Consume white space and a literal that ends a block, or the part of it before the text ends."""
        try:
            yield from self.spaces()
            yield from self.literal(literal)
        except EndOfText:
            self.rest()
        except Malformed:
            return False
        return True

    def run(self, pattern: re.Pattern[str], limit: int) -> Reading[str]:
        """Consume the longest run of 1 to `limit` characters. `pattern` matches runs of any length."""
        while True:
            match = pattern.match(self.text, self.pos)
            end = match.end() if match else self.pos
            if end - self.pos > limit or (end == self.pos and self.has_unread):
                raise Malformed
            if end < len(self.text):
                break
            yield from self.more()
        text, self.pos = self.text[self.pos : end], end
        return text

    def until(self, marker: Marker) -> Reading[tuple[str, str | None]]:
        """Consume text before a marker and return it, as soon as there is some; at the marker, consume that too.

        Returns (text, marker or None if more text follows). Raises `EndOfText` before what may begin a marker.
        """
        while True:
            text, start = self.text, self.pos
            if match := marker.pattern.search(text, start):
                self.pos = match.end()
                return text[start : match.start()], match[0]
            self.pos = marker.held(text, start)
            if self.pos > start:
                return text[start : self.pos], None
            yield from self.more()

"""`TextIndex`: where in some texts the last few tokens have been before. Hash chains, as compressors of text have them.

Owns an entry per token of every text it holds. Knows nothing of requests. Used by the drafters that guess from text.

Adding a token and looking one up take constant time: a lookup compares at most `MOST_PLACES` places over at most
`LONGEST` tokens. Like the match finder of Deflate, https://www.rfc-editor.org/rfc/rfc1951 section 4.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

KEY_TOKENS = 2  # so many tokens in a row are looked up
MOST_PLACES = 16
LONGEST = 32
_NOWHERE = -1
_SHIFT = 32  # a place is (number of the text, position); a key is two tokens
_MASK = (1 << _SHIFT) - 1


@dataclass(slots=True, eq=False)
class Text:
    """Tokens that may come again. `tokens` only grows; `before[p]` is the last place with the same key before p."""

    number: int
    tokens: Sequence[int]
    before: array[int] = field(default_factory=lambda: array("q"))


@dataclass(slots=True, eq=False)
class Match:
    """The last `length` tokens of some sequence (or more) also stand in `text` before position `at`."""

    text: Text
    at: int
    length: int


class TextIndex:
    """Any number of texts. Of equal matches the newest is found."""

    def __init__(self) -> None:
        self._newest: dict[int, int] = {}
        self._texts: dict[int, Text] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, number: int, tokens: Sequence[int]) -> Text:
        """Hold one more text; its tokens are indexed by `grow`."""
        text = self._texts[number] = Text(number, tokens)
        return text

    def grow(self, text: Text) -> None:
        """Index what was appended to the text's tokens since the last call."""
        tokens, before, newest = text.tokens, text.before, self._newest
        here = text.number << _SHIFT
        for _ in range(len(before), min(KEY_TOKENS, len(tokens))):
            before.append(_NOWHERE)
        for position in range(len(before), len(tokens)):
            key = tokens[position - 2] << _SHIFT | tokens[position - 1]
            before.append(newest.get(key, _NOWHERE))
            newest[key] = here | position

    def drop(self, text: Text) -> None:
        """Forget a text. Costs as much as adding it did."""
        del self._texts[text.number]
        for position in range(KEY_TOKENS, len(text.before)):
            key = text.tokens[position - 2] << _SHIFT | text.tokens[position - 1]
            if self._newest.get(key, _NOWHERE) >> _SHIFT == text.number:
                del self._newest[key]

    def find(self, tokens: Sequence[int]) -> Match | None:
        """The place whose past is like the end of `tokens` for longest, None where not even two tokens are."""
        if len(tokens) < KEY_TOKENS:
            return None
        place = self._newest.get(tokens[-2] << _SHIFT | tokens[-1], _NOWHERE)
        best: Match | None = None
        for _ in range(MOST_PLACES):
            text = self._texts.get(place >> _SHIFT)
            if text is None:
                break
            at = place & _MASK
            length = _common_end(text.tokens, at, tokens)
            if best is None or length > best.length:
                best = Match(text, at, length)
            place = text.before[at]
        return best


def _common_end(text: Sequence[int], at: int, tokens: Sequence[int]) -> int:
    """How many tokens before `at` are those at the end of `tokens`; at most LONGEST."""
    most = min(LONGEST, at, len(tokens))
    length = KEY_TOKENS
    while length < most and text[at - 1 - length] == tokens[-1 - length]:
        length += 1
    return length

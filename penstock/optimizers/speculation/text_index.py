"""`TextIndex`: where the last few tokens occurred before in some texts; `MatchCursor`: reads on from such a place.

The index owns an entry per token of every text it holds, in hash chains as compressors use them; the cursor owns one
sequence's place in a matched text. Neither knows of requests. Used by the drafters that draft from text.

Adding a token and looking one up take constant time: a lookup compares at most `MAX_CANDIDATES` places over at most
`MAX_MATCH_TOKENS` tokens. Like the match finder of Deflate, https://www.rfc-editor.org/rfc/rfc1951 section 4.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.optimizers.speculation.drafter import NUM_CONFIDENCE_LEVELS, Draft

KEY_TOKENS = 2  # consecutive tokens that form a lookup key
MAX_CANDIDATES = 16
MAX_MATCH_TOKENS = 32
_NO_PLACE = -1
_SHIFT = 32  # a place is (number of the text, position); a key is two tokens
_MASK = (1 << _SHIFT) - 1


@dataclass(slots=True, eq=False)
class Text:
    """Tokens that may recur. `tokens` only grows; `previous[p]` is the last place before p with the same key."""

    number: int
    tokens: Sequence[int]
    previous: array[int] = field(default_factory=lambda: array("q"))


@dataclass(slots=True, eq=False)
class Match:
    """The last `length` tokens of a sequence (or more) also precede `position` in `text`."""

    text: Text
    position: int
    length: int


class TextIndex:
    """Any number of texts. Among equally long matches the newest is returned."""

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
        """Index the tokens appended to the text since the last call."""
        tokens, previous, newest = text.tokens, text.previous, self._newest
        text_place = text.number << _SHIFT
        for _ in range(len(previous), min(KEY_TOKENS, len(tokens))):
            previous.append(_NO_PLACE)
        for position in range(len(previous), len(tokens)):
            key = tokens[position - 2] << _SHIFT | tokens[position - 1]
            previous.append(newest.get(key, _NO_PLACE))
            newest[key] = text_place | position

    def drop(self, text: Text) -> None:
        """Remove a text. Costs as much as adding it did."""
        del self._texts[text.number]
        for position in range(KEY_TOKENS, len(text.previous)):
            key = text.tokens[position - 2] << _SHIFT | text.tokens[position - 1]
            if self._newest.get(key, _NO_PLACE) >> _SHIFT == text.number:
                del self._newest[key]

    def find(self, tokens: Sequence[int]) -> Match | None:
        """The place preceded by the longest suffix of `tokens`; None where not even two tokens match."""
        if len(tokens) < KEY_TOKENS:
            return None
        place = self._newest.get(tokens[-2] << _SHIFT | tokens[-1], _NO_PLACE)
        best: Match | None = None
        for _ in range(MAX_CANDIDATES):
            text = self._texts.get(place >> _SHIFT)
            if text is None:
                break
            position = place & _MASK
            length = _common_suffix(text.tokens, position, tokens)
            if best is None or length > best.length:
                best = Match(text, position, length)
            place = text.previous[position]
        return best


def _common_suffix(text: Sequence[int], position: int, tokens: Sequence[int]) -> int:
    """How many tokens before `position` equal those at the end of `tokens`; at most `MAX_MATCH_TOKENS`."""
    limit = min(MAX_MATCH_TOKENS, position, len(tokens))
    length = KEY_TOKENS
    while length < limit and text[position - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


class MatchCursor:
    """The place of one sequence in a text that it repeats; `match` is None while there is none.

    A match is followed for as long as the text predicts the sequence, even when closer matches appear: the longest
    match predicts best.
    """

    __slots__ = ("_num_tokens", "match")

    def __init__(self) -> None:
        self.match: Match | None = None
        self._num_tokens = 0

    def advance(self, tokens: Sequence[int]) -> None:
        """Move over the tokens that the sequence gained since the last call; drop the match where they differ."""
        match = self.match
        if match is not None:
            text = match.text.tokens
            for position in range(self._num_tokens, len(tokens)):
                if match.position == len(text) or text[match.position] != tokens[position]:
                    self.match = None
                    break
                match.position += 1
                match.length += 1
        self._num_tokens = len(tokens)

    def read(self, count: int, *, repeat: bool) -> Draft:
        """The next `count` tokens of the matched text, fewer where it ends.

        With `repeat` it goes on with the same tokens again: right where the text is the sequence itself.
        """
        match = self.match
        if match is None:
            return Draft()
        tokens = match.text.tokens[match.position : match.position + count]
        if repeat and tokens and len(tokens) < count:
            tokens = (list(tokens) * (count // len(tokens) + 1))[:count]
        confidences = [min((match.length + i).bit_length(), NUM_CONFIDENCE_LEVELS - 1) for i in range(len(tokens))]
        return Draft(tuple(tokens), tuple(confidences))

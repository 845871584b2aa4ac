"""`Marker`: the text that ends a model's reasoning, found in its tokens; what may be sampled until it appears.

Owns the search (Knuth, Morris and Pratt) over the bytes of tokens and the masks of its states. Immutable. A constraint
keeps its state: how many bytes of the marker the output ends with.

The marker always ends with a token. A token that holds its last bytes and more would be in part reasoning and in part
output, so it cannot be sampled there, and neither can EOS: without an output there is nothing to end.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence


class Marker:
    """One marker for one vocabulary. `tokens` holds the bytes of every token, of special ones their text."""

    def __init__(self, text: str, tokens: Sequence[bytes], end_ids: Collection[int], num_words: int) -> None:
        self._bytes = text.encode()
        self._tokens = tokens
        self._end_ids = frozenset(end_ids)
        self._num_words = num_words
        self._borders = _borders(self._bytes)
        self._crossing = _crossing(self._bytes, tokens)
        self._masks: dict[int, array[int]] = {}

    @property
    def end(self) -> int:
        """The state in which the marker is complete."""
        return len(self._bytes)

    def after(self, state: int, token: int) -> int | None:
        """The state after one more token; None if that may not follow."""
        if token in self._end_ids:
            return None
        token_bytes = self._tokens[token] if token < len(self._tokens) else b""
        for place, byte in enumerate(token_bytes, 1):
            state = self._step(state, byte)
            if state == self.end:
                return state if place == len(token_bytes) else None
        return state

    def mask(self, state: int) -> array[int]:
        """The tokens that may follow in a state, a bit each."""
        mask = self._masks.get(state)
        if mask is None:
            refused = set(self._end_ids).union(*(self._crossing.get(place, ()) for place in self._suffixes(state)))
            mask = self._masks[state] = without(self._num_words, refused)
        return mask

    def _step(self, state: int, byte: int) -> int:
        while self._bytes[state] != byte:
            if not state:
                return 0
            state = self._borders[state]
        return state + 1

    def _suffixes(self, state: int) -> list[int]:
        """The lengths of all prefixes of the marker that the output ends with, 0 among them."""
        lengths = [state]
        while state:
            state = self._borders[state]
            lengths.append(state)
        return lengths


def without(num_words: int, refused: Collection[int]) -> array[int]:
    """A mask that allows every token but these."""
    mask = array("i", [-1]) * num_words
    for token in refused:
        clear(mask, 0, token)
    return mask


def clear(bits: array[int], first_word: int, token: int) -> None:
    """Refuse a token in the mask that begins at a word."""
    word = first_word + (token >> 5)
    bits[word] = _signed(bits[word] & ~(1 << (token & 31)))


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _borders(text: bytes) -> list[int]:
    """`borders[n]`: the length of the longest proper prefix of the first n bytes that is also their suffix."""
    borders = [0, 0]
    for end in range(1, len(text)):
        border = borders[end]
        while border and text[border] != text[end]:
            border = borders[border]
        borders.append(border + (text[border] == text[end]))
    return borders


def _crossing(marker: bytes, tokens: Sequence[bytes]) -> Mapping[int, list[int]]:
    """By number of bytes of the marker before them: the tokens that complete it and hold more."""
    crossing: dict[int, list[int]] = defaultdict(list)
    rests: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
    for place in range(1, len(marker)):
        rests[marker[place]].append((place, marker[place:]))
    for token, token_bytes in enumerate(tokens):
        if not token_bytes:
            continue
        begin = token_bytes.find(marker)
        if begin >= 0 and begin + len(marker) < len(token_bytes):
            crossing[0].append(token)
        for place, rest in rests.get(token_bytes[0], ()):
            if len(token_bytes) > len(rest) and token_bytes.startswith(rest):
                crossing[place].append(token)
    return crossing

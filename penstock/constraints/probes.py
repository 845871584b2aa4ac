"""Masks within strings of limited length, where llguidance tries every token that may be too long.

A few characters before a string's `maxLength` that is most of the vocabulary, and sequences that start together arrive
there together. `ProbeVocabulary` has one token for all plain ones of a length; `StringTail` says where a sequence may
be masked with it. Called by `GrammarVocabulary`.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper

Bits = npt.NDArray[np.int32]
_PLAIN = re.compile(r'[^"\\\x00-\x1f\x7f]{2,}')  # what any JSON string may have as it is
_PROBE = "\U000f4c4c"  # of a private use area: accepted where any character is, and in no text of a schema
_MAX_PENDING = 32  # tokens that a grammar takes in without a mask, which renews the fuel of its lexer
_NEAR = 9  # characters before a limit from which on most tokens would be tried one by one
_MAX_BYTES = 4  # of a character


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A tokenizer as llguidance takes it from a program."""

    eos_token_id: int
    tokens: list[bytes]
    special_token_ids: list[int]
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        """Encode a text, which nothing here asks for."""
        return []


class ProbeVocabulary:
    """A vocabulary without its plain tokens; after the others, it has one probe of each length that plain ones have.

    Plain tokens consist of two or more plain characters, and their length is the number of these. `texts` are the bytes
    of all tokens, empty for those without.
    """

    def __init__(self, texts: SequenceOf[bytes], eos_ids: SequenceOf[int], slices: SequenceOf[str]) -> None:
        plain = np.array([_plain_length(text) for text in texts], dtype=np.int32)
        lengths = sorted(set(plain[plain > 0].tolist()))
        self._texts, self._is_plain = texts, plain > 0
        kept = [b"" if is_plain else text for text, is_plain in zip(texts, self._is_plain, strict=True)]
        self._tokens = [*kept, *((_PROBE * length).encode() for length in lengths)]
        wrapper = TokenizerWrapper(_Tokens(eos_ids[0], self._tokens, list(eos_ids)))
        bare = LLTokenizer(wrapper, n_vocab=len(self._tokens), eos_token=list(eos_ids), slices=[])
        self.tokenizer = bare.with_slices(list(slices))
        self._plain_masks = [_packed((plain > 0) & (plain <= length)) for length in lengths]
        self._others = _packed(~self._is_plain)  # without the probes that share the last word
        self.pieces = cache(self._pieces)

    def fill(self, tails: SequenceOf[StringTail], executor: LLExecutor) -> list[Bits | None]:
        """The mask of each over the whole vocabulary, int32 [W]; None where llguidance has to try all tokens."""
        masks = np.zeros((len(tails), -(-len(self._tokens) // 32)), dtype=np.int32)
        grammars = [(tail.grammar, place) for place, tail in enumerate(tails)]
        executor.unsafe_compute_mask_ptr(grammars, masks.ctypes.data, masks.strides[0], len(masks))
        return [self._whole(mask) if tail.is_usable else None for tail, mask in zip(tails, masks, strict=True)]

    def text_of(self, token: int) -> bytes:
        """The bytes of a token."""
        return self._texts[token]

    def _pieces(self, token: int) -> list[int]:
        """Tokens of this vocabulary with the text of one that may not be in it; one that fails where there are none."""
        if not self._is_plain[token]:
            return [token]
        pieces = self.tokenizer.greedy_tokenize(self._texts[token].decode())
        is_whole = b"".join(self._tokens[piece] for piece in pieces) == self._texts[token]
        return pieces if is_whole else [len(self._tokens)]

    def _whole(self, mask: Bits) -> Bits | None:
        """Replace the probes by the plain tokens for which the longest that may follow stands.

        None if none may: then one text may have to follow, which llguidance allows as this vocabulary encodes it.
        """
        places = range(len(self._texts), len(self._tokens))
        num_allowed = next((i for i, t in enumerate(places) if not mask[t >> 5] >> (t & 31) & 1), len(places))
        if not num_allowed:
            return None
        return self._plain_masks[num_allowed - 1] | (mask[: len(self._others)] & self._others)


class StringTail:
    """What of a JSON string a sequence's output ends with, and its grammar over a `ProbeVocabulary`.

    Strings of the schema have the lengths `limits` at most; it states the texts `words`, which are sorted.
    """

    def __init__(
        self, grammar: LLMatcher, vocabulary: ProbeVocabulary, limits: SequenceOf[int], words: SequenceOf[bytes]
    ) -> None:
        self.grammar = grammar
        self._vocabulary = vocabulary
        self._limits = limits
        self._words = words
        self._text: bytearray | None = None  # None outside of strings
        self._pending: list[int] = []

    def start(self) -> StringTail:
        """The same for a sequence without output."""
        return StringTail(self.grammar.deep_copy(), self._vocabulary, self._limits, self._words)

    @property
    def is_usable(self) -> bool:
        """Whether the grammar has reached no limit."""
        return not self.grammar.is_error()

    def advance(self, tokens: SequenceOf[int]) -> None:
        """Follow accepted tokens; `catch_up` advances the grammar."""
        self._pending += tokens
        for token in tokens:
            text = self._vocabulary.text_of(token)
            if b'"' in text:
                self._text = _string_after(self._text, text)
            elif self._text is not None:
                self._text += text

    def catch_up(self) -> bool:
        """Whether a string nears its limit where the probes tell all that may follow; if so, advance to its place.

        They do within a string whose characters are free: no text that the schema states begins like it.
        """
        if not self._text or not self._is_near_limit(self._text) or not self._is_free(bytes(self._text)):
            return False
        for begin in range(0, len(self._pending), _MAX_PENDING):
            if begin:
                self.grammar.compute_bitmask()
            tokens = self._pending[begin : begin + _MAX_PENDING]
            self.grammar.consume_tokens([piece for token in tokens for piece in self._vocabulary.pieces(token)])
        self._pending.clear()
        return self.is_usable

    def _is_near_limit(self, text: bytearray) -> bool:
        if len(text) > _MAX_BYTES * max(self._limits, default=0):
            return False
        length = len(text.decode(errors="replace"))
        return any(0 < limit - length <= _NEAR for limit in self._limits)

    def _is_free(self, text: bytes) -> bool:
        place = bisect.bisect_right(self._words, text)  # of the first word that is longer, if any begins like this
        return b"\\" not in text and not any(word.startswith(text) for word in self._words[place : place + 1])


def _string_after(string: bytearray | None, text: bytes) -> bytearray | None:
    """The beginning of a JSON string that an output ends with, None outside of strings, after some more text."""
    while (end := text.find(b'"')) >= 0:
        part, text = (string or b"") + text[:end], text[end + 1 :]
        num_backslashes = len(part) - len(part.rstrip(b"\\"))
        string = bytearray() if string is None else bytearray(part + b'"') if num_backslashes % 2 else None
    return None if string is None else string + text


def limits_of(schema: str) -> tuple[int, ...]:
    """The lengths that a schema limits strings to."""
    pairs = _pairs(json.loads(schema))
    return tuple({int(value) for key, value in pairs if key == "maxLength" and isinstance(value, int | float)})


def words_of(schema: str) -> tuple[bytes, ...]:
    """Every string of a schema, keys included, in order: among them all texts that it states."""
    pairs = _pairs(json.loads(schema))
    words = {word for pair in pairs for word in pair if isinstance(word, str)}
    return tuple(sorted(word.encode("utf-8", "surrogatepass") for word in words))


def _pairs(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """All values of a JSON document, each with the key that it or its list has."""
    yield key, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _pairs(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _pairs(item, key)


def _plain_length(text: bytes) -> int:
    """The number of characters of a plain token, 0 for others."""
    try:
        return len(text.decode()) if _PLAIN.fullmatch(text.decode()) else 0
    except UnicodeDecodeError:
        return 0


def _packed(allowed: npt.NDArray[np.bool_]) -> Bits:
    """A mask int32 [W] of bool [V]."""
    padded = np.pad(allowed, (0, -len(allowed) % 32))
    return np.packbits(padded, bitorder="little").view(np.int32)

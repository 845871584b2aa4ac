"""`TokenDecoder`: decodes token ids with a tokenizer, safely for any id.

Owns the facts learned about a tokenizer's ids. Never raises for an id that the tokenizer does not know, such as the
padding of a model's vocabulary: it decodes to no text. Called by detokenizers on the engine's thread.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from weakref import WeakKeyDictionary

from penstock.engine.text.tokenizer import Tokenizer

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Kind(Enum):
    """How the decoder treats an id."""

    INVISIBLE = "invisible"  # omitted: a skipped special token, an id outside the vocabulary
    BYTE = "byte"  # <0x41>: combined with its neighbours to characters
    TEXT = "text"


@dataclass(slots=True)
class Facts:
    """Facts about a vocabulary, learned id by id; shared by all decoders of one tokenizer.

    `context_free`: after a complete character, the text of a token, or of a character written in byte tokens, never
    depends on earlier tokens. If so, `texts` and `characters` hold these texts. `num_ids`: for a tokenizer written in
    Python, the exclusive upper bound of its ids.
    """

    context_free: bool
    num_ids: int = 0
    kinds: dict[int, Kind] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    characters: dict[str, str] = field(default_factory=dict)


_facts: WeakKeyDictionary[Tokenizer, dict[bool, Facts]] = WeakKeyDictionary()


class TokenDecoder:
    """Decodes with a transformers tokenizer whose vocabulary no longer changes."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self.facts = _facts_of(tokenizer, skip_special_tokens)
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens

    def decode(self, visible: list[int]) -> str:
        """The text of ids, none of which is invisible. Raises whatever the tokenizer raises."""
        options = {"skip_special_tokens": self._skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(visible, **options))

    def text(self, token_ids: Iterable[int]) -> str:
        """The text of any ids."""
        visible = [token_id for token_id in token_ids if self.kind(token_id) is not Kind.INVISIBLE]
        return self.decode(visible) if visible else ""

    def kind(self, token_id: int) -> Kind:
        """How the decoder treats an id."""
        kind = self.facts.kinds.get(token_id)
        if kind is None:
            kind = self.facts.kinds[token_id] = self._classify(token_id)
            if kind is Kind.INVISIBLE and self.facts.context_free:
                self.facts.texts[token_id] = ""
        return kind

    def _classify(self, token_id: int) -> Kind:
        token = self._token(token_id)
        if token is None:
            return Kind.INVISIBLE
        match = _BYTE.fullmatch(token) if isinstance(token, str) else None
        if match and match[0] not in self.decode([token_id]):  # otherwise the decoder treats it as literal text
            self.facts.bytes[token_id] = int(match[1], 16)
            return Kind.BYTE
        return Kind.TEXT

    def _token(self, token_id: int) -> str | bytes | None:
        """The vocabulary's entry, or None if decoding omits it; some tokenizers written in Python have bytes."""
        tokenizer = self._tokenizer
        if hasattr(tokenizer, "backend_tokenizer"):
            # Its special tokens differ from those that transformers lists. A decoded token yields at least U+FFFD,
            # except for spaces at the start of a text, so a token that is empty even eight times in a row is omitted.
            (token,) = tokenizer.convert_ids_to_tokens([token_id])
            return None if token is None or not self.decode([token_id] * 8) else token
        if token_id >= self.facts.num_ids:
            return None
        try:
            tokens = tokenizer.convert_ids_to_tokens([token_id], skip_special_tokens=self._skip_special_tokens)
        except LookupError:  # a vocabulary with gaps
            return None
        return tokens[0] if tokens else None


def _facts_of(tokenizer: Tokenizer, skip_special_tokens: bool) -> Facts:
    facts_by_mode = _facts.setdefault(tokenizer, {})
    if skip_special_tokens not in facts_by_mode:
        in_python = not hasattr(tokenizer, "backend_tokenizer")
        facts_by_mode[skip_special_tokens] = Facts(_is_context_free(tokenizer), _num_ids(tokenizer) if in_python else 0)
    return facts_by_mode[skip_special_tokens]


def _num_ids(tokenizer: Tokenizer) -> int:
    """The highest id plus one; a vocabulary with gaps has fewer tokens."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    length = len(tokenizer) if isinstance(tokenizer, Sized) else sys.maxsize
    return max(length, max(vocabulary.values(), default=-1) + 1)


def _is_context_free(tokenizer: Tokenizer) -> bool:
    """True for the two decoders that almost all models use: byte-level, and Replace, ByteFallback, Fuse, Strip.

    Tokens of other decoders are always decoded in context.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None or redefines(tokenizer, "decode", "_decode"):
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    return decoder["type"] == "ByteLevel" or all(map(_works_by_character, parts))


def _works_by_character(decoder: dict[str, object]) -> bool:
    match decoder:
        case {"type": "ByteFallback" | "Fuse"} | {"type": "Strip", "stop": 0}:
            return True
        case {"type": "Replace", "pattern": {"String": pattern}}:
            return len(pattern) == 1
    return False


def redefines(tokenizer: Tokenizer, *names: str) -> bool:
    """Whether a model's own tokenizer class overrides one of these methods of the common base classes."""
    return _class_redefines(type(tokenizer), names)


@lru_cache(maxsize=64)
def _class_redefines(kind: type, names: tuple[str, ...]) -> bool:
    classes = (c for c in kind.__mro__ if not c.__module__.startswith("transformers.tokenization_"))
    return any(name in vars(c) for c in classes for name in names)

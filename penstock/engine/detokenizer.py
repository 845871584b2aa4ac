"""`Detokenizer`: token ids in, text out, one request at a time, exactly what decoding all ids at once would give.

Owns the few ids whose text may still change. Never emits half a character, never decodes the whole output again, never
changes the tokenizer. Called by `TextStream` on the engine's thread, with a tokenizer that no other thread uses.
"""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet one

# UTF-8 resynchronises after three bytes and a visible token holds at least one, so the last four ids always know
# whether the stream is inside a character.
_RESYNC = 4


class _Kind(Enum):
    INVISIBLE = "invisible"  # the decoder never sees it: a skipped special token, an id outside the vocabulary
    BYTE = "byte"  # <0x41>: a byte-fallback decoder judges a whole run of these at once
    TEXT = "text"


@dataclass(slots=True)
class _Facts:
    """What is known of a vocabulary, learned id by id; shared by all detokenizers of one tokenizer."""

    context_free: bool
    kinds: dict[int, _Kind] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)  # text after a settled character, if context_free


_facts: WeakKeyDictionary[Any, dict[bool, _Facts]] = WeakKeyDictionary()


class Detokenizer:
    """Turns a stream of token ids into a stream of text.

    The joined results of `push` and the final `flush` equal `tokenizer.decode(ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)` for any ids; ids outside the vocabulary have no text. A push costs O(1)
    amortised. `tokenizer` is a transformers tokenizer whose vocabulary no longer changes.
    `spaces_between_special_tokens` is accepted because callers carry it: transformers 5 decodes the same either way.

    `tokenizers.DecodeStream` is not used: it loses what it holds back at the end, raises on a run of byte tokens that
    turns out invalid, and is quadratic while bytes stay invalid.
    """

    def __init__(
        self, tokenizer: Any, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._facts = _facts_of(tokenizer, skip_special_tokens)
        self._texts = self._facts.texts
        self._window: list[int] = []  # visible ids: an anchor whose text was sent, then those that are not settled
        self._num_sent = 0  # characters of the window's text that were returned
        self._settled = False  # the window is only an anchor, ends a character, and the stream has text

    def copy(self) -> Detokenizer:
        """Another one that goes on from here by itself."""
        twin = copy(self)
        twin._window = list(self._window)
        return twin

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; often "" in the middle of a character or of a byte run."""
        if self._settled:
            text = self._texts.get(token_id)
            if text is not None:
                return text
        return self._push_unknown(token_id)

    def flush(self) -> str:
        """The text held back so far, now that no token follows. Afterwards the detokenizer is as new."""
        text = "" if self._settled or not self._window else self._decode(self._window)[self._num_sent :]
        self._window, self._num_sent, self._settled = [], 0, False
        return text

    def _push_unknown(self, token_id: int) -> str:
        kind, was_settled = self._kind(token_id), self._settled
        if kind is _Kind.INVISIBLE:
            return ""
        self._window.append(token_id)
        self._settled = False
        if kind is _Kind.BYTE:
            return ""
        text = self._advance()
        if was_settled and self._settled and self._facts.context_free:
            self._texts[token_id] = text
        return text

    def _advance(self) -> str:
        """Return the window's new text, but for a last U+FFFD: only that one can still turn into a character."""
        text = self._decode(self._window)
        is_held = text.endswith(REPLACEMENT)
        new = text[self._num_sent : len(text) - is_held]
        self._num_sent += len(new)
        self._settled = bool(text) and not is_held
        if self._settled:
            self._reanchor(1, is_held)
        elif len(self._window) > 2 * _RESYNC:
            self._reanchor(_RESYNC, is_held)
        return new

    def _reanchor(self, count: int, is_held: bool) -> None:
        """Keep only the last `count` ids, or as many more as it takes to end like the whole window does."""
        while count < len(self._window):
            text = self._decode(self._window[-count:])
            if text and text.endswith(REPLACEMENT) == is_held:
                self._window = self._window[-count:]
                self._num_sent = len(text) - is_held
                return
            count *= 2

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _kind(self, token_id: int) -> _Kind:
        kind = self._facts.kinds.get(token_id)
        if kind is None:
            kind = self._facts.kinds[token_id] = self._classify(token_id)
            if kind is _Kind.INVISIBLE and self._facts.context_free:
                self._texts[token_id] = ""
        return kind

    def _classify(self, token_id: int) -> _Kind:
        token = self._token(token_id)
        if token is None:
            return _Kind.INVISIBLE
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return _Kind.BYTE if is_byte else _Kind.TEXT

    def _token(self, token_id: int) -> str | None:
        """The vocabulary's entry, or None if decoding leaves it out."""
        tokenizer = self._tokenizer
        if hasattr(tokenizer, "backend_tokenizer"):
            # It skips other tokens than the ones transformers lists as special. What it decodes shows at least as
            # U+FFFD, but for spaces at the start of a text, so a token that is empty eight times in a row is left out.
            return tokenizer.convert_ids_to_tokens(token_id) if self._decode([token_id] * 8) else None
        if token_id >= len(tokenizer):
            return None
        tokens = tokenizer.convert_ids_to_tokens([token_id], skip_special_tokens=self._skip_special_tokens)
        return tokens[0] if tokens else None


def _facts_of(tokenizer: Any, skip_special_tokens: bool) -> _Facts:
    both = _facts.setdefault(tokenizer, {})
    if skip_special_tokens not in both:
        both[skip_special_tokens] = _Facts(context_free=_is_context_free(tokenizer))
    return both[skip_special_tokens]


def _is_context_free(tokenizer: Any) -> bool:
    """Whether a token's text, after a complete character, never depends on which tokens came before.

    Known of the two decoders that nearly all models have: byte-level, and Replace, ByteFallback, Fuse, Strip. Others
    are decoded in context each time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None or redefines(tokenizer, "decode", "_decode"):
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    return decoder["type"] == "ByteLevel" or all(map(_works_by_character, parts))


def _works_by_character(decoder: dict[str, Any]) -> bool:
    match decoder:
        case {"type": "ByteFallback" | "Fuse"} | {"type": "Strip", "stop": 0}:
            return True
        case {"type": "Replace", "pattern": {"String": pattern}}:
            return len(pattern) == 1
    return False


def redefines(tokenizer: Any, *names: str) -> bool:
    """Whether a model's own tokenizer class changes one of these methods of the common base classes."""
    classes = (c for c in type(tokenizer).__mro__ if not c.__module__.startswith("transformers.tokenization_"))
    return any(name in vars(c) for c in classes for name in names)

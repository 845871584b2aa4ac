"""`Detokenizer`: token ids in, text out, one request at a time, as decoding all ids at once would give it.

Owns the few ids whose text may still change. Never emits half a character, never decodes the whole output again, never
changes the tokenizer. Called by `TextStream` on the engine's thread, with a tokenizer that no other thread uses.
"""

from __future__ import annotations

from copy import copy

from penstock.engine.text.decoding import Kind, TokenDecoder
from penstock.engine.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet one

# UTF-8 resynchronises after three bytes and a visible token holds at least one, so the last four ids always know
# whether the stream is inside a character.
_RESYNC = 4


class Detokenizer:
    """Turns a stream of token ids into a stream of text.

    The joined results of `push` and the final `flush` equal `tokenizer.decode(ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)`, with one exception. A run of byte tokens (<0xE6>) that is not valid UTF-8 as a
    whole decodes to one U+FFFD for each of its bytes, which only its end can tell. Here characters show as soon as they
    are complete, in such runs too, and only the bytes that belong to no character are one U+FFFD each.
    Ids outside the vocabulary have no text. A push costs O(1) amortised. `tokenizer` is a transformers tokenizer whose
    vocabulary no longer changes. `spaces_between_special_tokens` is accepted because callers carry it: transformers 5
    decodes the same either way.

    `tokenizers.DecodeStream` is not used: it loses what it holds back at the end, raises on a run of byte tokens that
    turns out invalid, and is quadratic while bytes stay invalid.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._decoder = TokenDecoder(tokenizer, skip_special_tokens)
        self._facts = self._decoder.facts
        self._texts = self._facts.texts
        self._window: list[int] = []  # visible ids: an anchor whose text was sent, then those that are not settled
        self._num_sent = 0  # characters of the window's text that were returned
        self._at_boundary = False  # the window is only an anchor, ends a character, and the stream has text
        self._bytes: list[int] = []  # byte tokens of a character that is not complete, behind the window
        self._was_at_boundary = False  # before those
        self._in_invalid_run = False  # the window is a byte that is no character, in a run that may go on

    def copy(self) -> Detokenizer:
        """Another one that goes on from here by itself."""
        clone = copy(self)
        clone._window, clone._bytes = list(self._window), list(self._bytes)
        return clone

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; often "" in the middle of a character."""
        if self._at_boundary:
            text = self._texts.get(token_id)
            if text is not None:
                return text
        return self._push_unknown(token_id)

    def flush(self) -> str:
        """The text held back so far, now that no token follows. Afterwards the detokenizer is as new."""
        text = self._flush_invalid() if self._bytes else self._held()
        self._window, self._num_sent, self._at_boundary, self._in_invalid_run = [], 0, False, False
        return text

    def _push_unknown(self, token_id: int) -> str:
        kind = self._decoder.kind(token_id)
        if kind is Kind.INVISIBLE:
            return ""
        if kind is Kind.BYTE:
            return self._push_byte(token_id)
        before = self._flush_invalid() if self._bytes else ""
        was_at_boundary, self._at_boundary, self._in_invalid_run = self._at_boundary, False, False
        self._window.append(token_id)
        text = self._advance()
        if was_at_boundary and self._at_boundary and self._facts.context_free:
            self._texts[token_id] = text
        return before + text

    def _advance(self) -> str:
        """Return the window's new text, but for a last U+FFFD: only that one can still turn into a character."""
        text = self._decoder.decode(self._window)
        is_held = text.endswith(REPLACEMENT)
        new_text = text[self._num_sent : len(text) - is_held]
        self._num_sent += len(new_text)
        self._at_boundary = bool(text) and not is_held
        if self._at_boundary:
            self._reanchor(1, is_held, is_held)
        elif len(self._window) > 2 * _RESYNC:
            self._reanchor(_RESYNC, is_held, is_held)
        return new_text

    def _reanchor(self, count: int, is_replaced: bool, num_held: int) -> None:
        """Keep only the last `count` ids, or as many more as it takes to end like the whole window does."""
        while count < len(self._window):
            text = self._decoder.decode(self._window[-count:])
            if text and text.endswith(REPLACEMENT) == is_replaced:
                self._window = self._window[-count:]
                self._num_sent = len(text) - num_held
                return
            count *= 2

    def _held(self) -> str:
        """The window's text that was not returned."""
        return "" if self._at_boundary or not self._window else self._decoder.decode(self._window)[self._num_sent :]

    def _push_byte(self, token_id: int) -> str:
        if not self._bytes:
            self._was_at_boundary, self._at_boundary = self._at_boundary, False
        self._bytes.append(token_id)
        try:
            character = bytes(self._facts.bytes[token] for token in self._bytes).decode()
        except UnicodeDecodeError as error:
            if error.end == len(self._bytes) and error.reason == "unexpected end of data":
                return ""
            return self._push_invalid(token_id)
        return self._complete(character)

    def _push_invalid(self, token_id: int) -> str:
        """The newest byte does not go on with the character begun: that one is none, and this may begin another."""
        if len(self._bytes) == 1:
            return self._flush_invalid()
        self._bytes.pop()
        return self._flush_invalid() + self._push_byte(token_id)

    def _flush_invalid(self) -> str:
        """What was held, and U+FFFD for each byte of a character that will not be completed."""
        text = "" if self._was_at_boundary else self._held()
        text += REPLACEMENT * len(self._bytes)
        self._window = self._bytes[-1:]
        self._num_sent = len(self._decoder.decode(self._window))
        self._bytes, self._at_boundary, self._in_invalid_run = [], True, True
        return text

    def _complete(self, character: str) -> str:
        """A character that byte tokens spelled: certain whatever follows."""
        token_ids, self._bytes = self._bytes, []
        characters = self._facts.characters
        if self._in_invalid_run or (self._was_at_boundary and character in characters):
            self._at_boundary = True
            if not self._in_invalid_run:
                self._window, self._num_sent = token_ids, len(characters[character])
            return characters.get(character, character)
        self._window += token_ids
        text = self._decoder.decode(self._window)
        new_text, self._num_sent = text[self._num_sent :], len(text)
        self._at_boundary = bool(text)
        self._reanchor(len(token_ids), character == REPLACEMENT, 0)
        if self._was_at_boundary and self._facts.context_free:
            characters[character] = new_text
        return new_text

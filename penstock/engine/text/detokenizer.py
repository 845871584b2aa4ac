"""`Detokenizer`: token ids in, text out, exactly as decoding all ids at once would give it.

Owns the few ids whose text may still change. Never emits an incomplete character, never decodes the whole output again,
never changes the tokenizer. Called by `TextStream` on the engine's thread, with a tokenizer that no other thread uses.
"""

from __future__ import annotations

from copy import copy

from penstock.engine.text.token_text import Kind, TokenDecoder
from penstock.engine.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # the decoders' text for bytes that are not a complete character

# UTF-8 resynchronises after three bytes and a visible token holds at least one, so the last four ids always determine
# whether the stream is inside a character.
_RESYNC = 4


class Detokenizer:
    """Converts a stream of token ids to a stream of text.

    The joined results of `push` and the final `flush` equal `tokenizer.decode(ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)`, with one exception. A run of byte tokens (<0xE6>) that is not valid UTF-8 as a
    whole decodes to one U+FFFD for each of its bytes, which is known only at its end. Here characters are emitted as
    soon as they are complete, in such runs too, and only bytes that belong to no character become one U+FFFD each.

    Ids outside the vocabulary have no text. A push costs O(1) amortised. `tokenizer` is a transformers tokenizer whose
    vocabulary no longer changes. `spaces_between_special_tokens` has no effect: it is accepted because callers pass it,
    and transformers 5 decodes the same either way.

    `tokenizers.DecodeStream` is not used: it loses the held-back text at the end, raises on a run of byte tokens that
    turns out invalid, and is quadratic while bytes stay invalid.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._decoder = TokenDecoder(tokenizer, skip_special_tokens)
        self._facts = self._decoder.facts
        self._texts = self._facts.texts
        self._window: list[int] = []  # visible ids: an anchor whose text was returned, then ids without final text
        self._num_sent = 0  # returned characters of the window's text
        self._at_boundary = False  # the window is only an anchor, ends a character, and has text
        self._bytes: list[int] = []  # byte tokens of an incomplete character, after the window
        self._was_at_boundary = False  # the state before those
        self._in_invalid_run = False  # the window is an invalid byte, in a run that may continue

    def copy(self) -> Detokenizer:
        """An independent detokenizer in the same state."""
        clone = copy(self)
        clone._window, clone._bytes = list(self._window), list(self._bytes)
        return clone

    def push(self, token_id: int) -> str:
        """The text that became final with this token; often "" in the middle of a character."""
        if self._at_boundary:
            text = self._texts.get(token_id)
            if text is not None:
                return text
        return self._push_unknown(token_id)

    def flush(self) -> str:
        """The text held back so far, when no token follows. Resets the detokenizer."""
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
        """Return the window's new text, except a trailing U+FFFD, the only character that may still change."""
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
        """Keep only the last `count` ids, or as many more as are needed to end like the whole window."""
        while count < len(self._window):
            text = self._decoder.decode(self._window[-count:])
            if text and text.endswith(REPLACEMENT) == is_replaced:
                self._window = self._window[-count:]
                self._num_sent = len(text) - num_held
                return
            count *= 2

    def _held(self) -> str:
        """The text of the window that was not yet returned."""
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
        """The newest byte does not continue the current character: flush that, and start another one."""
        if len(self._bytes) == 1:
            return self._flush_invalid()
        self._bytes.pop()
        return self._flush_invalid() + self._push_byte(token_id)

    def _flush_invalid(self) -> str:
        """Return the held text, and U+FFFD for each byte of a character that will not be completed."""
        text = "" if self._was_at_boundary else self._held()
        text += REPLACEMENT * len(self._bytes)
        self._window = self._bytes[-1:]
        self._num_sent = len(self._decoder.decode(self._window))
        self._bytes, self._at_boundary, self._in_invalid_run = [], True, True
        return text

    def _complete(self, character: str) -> str:
        """Return a character that byte tokens spell; no later token can change it."""
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

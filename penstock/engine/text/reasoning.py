"""`ReasoningEnd`: finds the text that ends a model's reasoning, so that stop strings sleep until then.

Owns its position in the text; never reads a character twice. Called by `TextStream`. The grammar of a request finds the
same text in the bytes of tokens (`constraints/reasoning.py`).
"""

from __future__ import annotations

from penstock.engine.text.stops import StopStrings


class ReasoningEnd:
    """Watches a stream for the first occurrence of `marker`, or for the special token `token_id` that stands for it."""

    def __init__(self, marker: str, token_id: int | None = None) -> None:
        self._search = StopStrings((marker,), include=True)
        self._token_id = token_id
        self._num_before = 0  # characters that may belong to the marker, of earlier texts

    def push(self, token_id: int | None, text: str) -> int | None:
        """How many characters of the token's text belong to the reasoning; None while it goes on."""
        visible, marker = self._search.push(text)
        if marker is not None:
            return len(visible) - self._num_before
        self._num_before += len(text) - len(visible)
        return len(text) if token_id is not None and token_id == self._token_id else None

"""`TextWatch`: finds stop strings in the text of a beam, for the search that it belongs to.

Owns a stream of text that it never moves: every further token gets a copy. Runs on the engine's thread, called by
`BeamSearch` through its protocol `Watch`.
"""

from __future__ import annotations

from penstock.engine.endings import text_fault
from penstock.engine.textstream import TextStream


class TextWatch:
    """Watches the text that `stream` has come to."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def after(self, token: int) -> TextWatch | None:
        """The text with one more token; None when that completes a stop string. Raises `RequestError`."""
        stream = self._stream.copy()
        try:
            stop = stream.push([token]).stop
        except BaseException as error:  # a tokenizer's panic is no `Exception`
            raise text_fault(error) from error
        return TextWatch(stream) if stop is None else None

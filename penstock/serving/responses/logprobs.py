"""The log probabilities of a response's content: those of the tokens behind the reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.outputs import Logprob
from penstock.serving.logprobs import chat_logprobs, token_text

Entries = Sequence[Mapping[int, Logprob]]


class ContentLogprobs:
    """Takes tokens as they arrive and gives them out with the content. `end` is the marker that ends reasoning."""

    def __init__(self, top: int, end: str | None) -> None:
        self._top = top
        self._end = end
        self._pending: list[tuple[int, Mapping[int, Logprob]]] = []
        self._is_known = end is None  # whether the output begins with reasoning
        self._is_reasoning = False
        self._tail = ""

    def add(self, ids: Sequence[int], entries: Entries) -> None:
        """Take tokens."""
        for token, entry in zip(ids, entries, strict=True):
            if self._is_reasoning:
                self._skip(token_text(token, entry[token]))
            else:
                self._pending.append((token, entry))

    def begin(self, is_reasoning: bool) -> None:
        """The first piece of the output is, or is not, reasoning. Later calls have no effect."""
        if self._is_known:
            return
        self._is_known, self._is_reasoning = True, is_reasoning
        pending, self._pending = self._pending, []
        self.add([token for token, _ in pending], [entry for _, entry in pending])

    def take(self) -> list[object]:
        """The entries that were not given out yet."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        value = chat_logprobs([token for token, _ in pending], [entry for _, entry in pending], self._top)
        content = value["content"]
        assert isinstance(content, list)
        return content

    def _skip(self, text: str) -> None:
        assert self._end is not None
        self._tail += text
        self._is_reasoning = self._end not in self._tail
        self._tail = self._tail[-len(self._end) :]

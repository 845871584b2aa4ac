"""`NgramDrafter`: drafts that a sequence repeats itself, prompt included (prompt lookup decoding [1]).

Owns an index per sequence. Needs no model; a draft takes microseconds. Called on the engine's thread.
[1] Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from penstock.optimizers.speculation.drafter import Draft, DraftRequest
from penstock.optimizers.speculation.text_index import MatchCursor, TextIndex
from penstock.sequence import Sequence


class OwnText:
    """One sequence's tokens, and the earlier place in them that it repeats."""

    __slots__ = ("_cursor", "_index", "_text")

    def __init__(self, seq: Sequence) -> None:
        self._index = TextIndex()
        self._text = self._index.add(0, seq.tokens)
        self._cursor = MatchCursor()

    def update(self) -> int:
        """Index the newest tokens; the length of the match that they end, 0 for none."""
        tokens, cursor = self._text.tokens, self._cursor
        cursor.advance(tokens)
        self._index.grow(self._text)
        if cursor.match is None:
            cursor.match = self._index.find(tokens)
        return 0 if cursor.match is None else cursor.match.length

    def read(self, count: int) -> Draft:
        """The tokens that followed the earlier place."""
        return self._cursor.read(count, repeat=True)


class NgramDrafter:
    """See the module's docstring."""

    name = "ngram"
    runs_model = False

    def __init__(self) -> None:
        self._texts: dict[int, OwnText] = {}

    def propose(self, requests: SequenceOf[DraftRequest]) -> list[Draft]:
        """A draft for each request, in order."""
        return [self._propose(request) for request in requests]

    def forget(self, seq_id: int) -> None:
        """Drop the index of a sequence that ended."""
        self._texts.pop(seq_id, None)

    def _propose(self, request: DraftRequest) -> Draft:
        text = self._texts.get(request.seq.id)
        if text is None:
            text = self._texts[request.seq.id] = OwnText(request.seq)
        return text.read(request.max_tokens) if text.update() else Draft()

"""`NgramDrafter`: guesses that a sequence repeats itself, prompt included (prompt lookup [1]).

Owns an index per sequence. Needs no model; a guess takes microseconds. Consulted on the engine's thread.
[1] Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from penstock.optimizers.speculation.drafter import Ask, Draft
from penstock.optimizers.speculation.follower import Follower
from penstock.optimizers.speculation.index import TextIndex
from penstock.sequence import Sequence


class OwnText:
    """What one sequence has said so far, and where it repeats that."""

    __slots__ = ("_follower", "_index", "_text")

    def __init__(self, seq: Sequence) -> None:
        self._index = TextIndex()
        self._text = self._index.add(0, seq.tokens)
        self._follower = Follower()

    def follow(self) -> int:
        """Take in the newest tokens; how many of them are like an earlier place, 0 for none."""
        tokens, follower = self._text.tokens, self._follower
        follower.follow(tokens)
        self._index.grow(self._text)
        if follower.match is None:
            follower.match = self._index.find(tokens)
        return 0 if follower.match is None else follower.match.length

    def read(self, count: int) -> Draft:
        """What came after that place."""
        return self._follower.read(count, own=True)


class NgramDrafter:
    """See the module's docstring."""

    name = "ngram"
    runs_model = False

    def __init__(self) -> None:
        self._texts: dict[int, OwnText] = {}

    def propose(self, asks: SequenceOf[Ask]) -> list[Draft]:
        """A draft for each ask, in order."""
        return [self._propose(ask) for ask in asks]

    def forget(self, seq_id: int) -> None:
        """Drop the index of a sequence that ended."""
        self._texts.pop(seq_id, None)

    def _propose(self, ask: Ask) -> Draft:
        text = self._texts.get(ask.seq.id)
        if text is None:
            text = self._texts[ask.seq.id] = OwnText(ask.seq)
        return text.read(ask.most) if text.follow() else Draft()

"""`Follower`: keeps its place in a text that a sequence repeats, and reads on from there.

Owns the place. A match is followed for as long as the text goes on to be right, however many closer ones come up,
because the longest past predicts best. Used by the drafters that guess from text.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.optimizers.speculation.drafter import NUM_KINDS, Draft
from penstock.optimizers.speculation.index import Match


class Follower:
    """The place of one sequence; `match` is None while there is none."""

    __slots__ = ("_seen", "match")

    def __init__(self) -> None:
        self.match: Match | None = None
        self._seen = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Go along with the tokens that came since the last call; what turned out otherwise is no match any more."""
        match = self.match
        if match is not None:
            text = match.text.tokens
            for position in range(self._seen, len(tokens)):
                if match.at == len(text) or text[match.at] != tokens[position]:
                    self.match = None
                    break
                match.at += 1
                match.length += 1
        self._seen = len(tokens)

    def read(self, count: int, *, own: bool) -> Draft:
        """The next `count` tokens of the matched text, fewer where it ends.

        `own` says that the text is the sequence's own: what lies beyond its end is the repetition itself.
        """
        match = self.match
        if match is None:
            return Draft()
        found = match.text.tokens[match.at : match.at + count]
        if own and found and len(found) < count:
            found = (list(found) * (count // len(found) + 1))[:count]
        kinds = [min((match.length + i).bit_length(), NUM_KINDS - 1) for i in range(len(found))]
        return Draft(tuple(found), tuple(kinds))

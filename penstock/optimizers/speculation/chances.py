"""`Chances`: how often guesses of each kind turn out right, learnt from those that were judged.

Owns decaying counts per kind, over a prior that may be another `Chances`: a request begins with what all requests
taught. Used by `SpeculationController`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from penstock.optimizers.speculation.drafter import NUM_KINDS

# Before anything was seen: a higher kind is a better one.
FIRST_GUESS = tuple((kind + 1) / (NUM_KINDS + 1) for kind in range(NUM_KINDS))
LEAST, _MOST = 0.05, 0.995  # no guess is worth anything, or sure


class Chances:
    """`weight` is how many guesses the prior counts for, `memory` after how many a guess is as good as forgotten."""

    __slots__ = ("_keep", "_prior", "_rights", "_tries", "_weight")

    def __init__(self, prior: Chances | None = None, *, weight: float, memory: int) -> None:
        self._prior = prior
        self._weight = weight
        self._keep = 1.0 - 1.0 / memory
        self._rights = [0.0] * NUM_KINDS
        self._tries = [0.0] * NUM_KINDS

    def learn(self, kinds: SequenceOf[int], accepted: int) -> None:
        """The first `accepted` of a draft's guesses were right, the next one, if there is one, was wrong."""
        for place, kind in enumerate(kinds[: accepted + 1]):
            self._rights[kind] = self._rights[kind] * self._keep + (place < accepted)
            self._tries[kind] = self._tries[kind] * self._keep + 1.0
        if self._prior is not None:
            self._prior.learn(kinds, accepted)

    def of(self, kind: int) -> float:
        """The chance of one guess of this kind, given that those before it were right."""
        prior = FIRST_GUESS[kind] if self._prior is None else self._prior.of(kind)
        return min(_MOST, (self._rights[kind] + self._weight * prior) / (self._tries[kind] + self._weight))

    def table(self) -> list[float]:
        """The chances of all kinds."""
        return [self.of(kind) for kind in range(NUM_KINDS)]

    def gains(self, kinds: SequenceOf[int]) -> list[float]:
        """For each guess of a draft, the chance that it and all before it are right, down to `LEAST`."""
        found, gain, last, chance = [], 1.0, -1, 1.0
        for kind in kinds:
            if kind != last:
                last, chance = kind, self.of(kind)
            gain *= chance
            if gain < LEAST:
                break
            found.append(gain)
        return found

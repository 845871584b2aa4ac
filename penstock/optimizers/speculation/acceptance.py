"""`AcceptanceRates`: how often draft tokens of each confidence level are accepted, measured on verified drafts.

Owns decaying counts per level, over a prior that may be another `AcceptanceRates`: a request starts from what all
requests showed. Used by `SpeculationController`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from penstock.optimizers.speculation.drafter import NUM_CONFIDENCE_LEVELS

# The rates before any draft was verified.
INITIAL_RATES = tuple((level + 1) / (NUM_CONFIDENCE_LEVELS + 1) for level in range(NUM_CONFIDENCE_LEVELS))
MIN_PROBABILITY = 0.05  # a draft token accepted less often than this is never worth its place
_MAX_RATE = 0.995  # no token is certain


class AcceptanceRates:
    """`weight` is how many tokens the prior counts for; a token's weight decays over the next `memory` tokens."""

    __slots__ = ("_accepted", "_decay", "_prior", "_verified", "_weight")

    def __init__(self, prior: AcceptanceRates | None = None, *, weight: float, memory: int) -> None:
        self._prior = prior
        self._weight = weight
        self._decay = 1.0 - 1.0 / memory
        self._accepted = [0.0] * NUM_CONFIDENCE_LEVELS
        self._verified = [0.0] * NUM_CONFIDENCE_LEVELS

    def record(self, confidences: SequenceOf[int], num_accepted: int) -> None:
        """The first `num_accepted` tokens of a draft were accepted and the next one, if any, was rejected."""
        for place, level in enumerate(confidences[: num_accepted + 1]):
            self._accepted[level] = self._accepted[level] * self._decay + (place < num_accepted)
            self._verified[level] = self._verified[level] * self._decay + 1.0
        if self._prior is not None:
            self._prior.record(confidences, num_accepted)

    def rate(self, level: int) -> float:
        """The probability that a token of this level is accepted, given that those before it were."""
        prior = INITIAL_RATES[level] if self._prior is None else self._prior.rate(level)
        return min(_MAX_RATE, (self._accepted[level] + self._weight * prior) / (self._verified[level] + self._weight))

    def table(self) -> list[float]:
        """The rates of all levels."""
        return [self.rate(level) for level in range(NUM_CONFIDENCE_LEVELS)]

    def probabilities(self, confidences: SequenceOf[int]) -> list[float]:
        """For each token of a draft, the probability that it and all before it are accepted.

        The list ends before the first that is below `MIN_PROBABILITY`.
        """
        probabilities: list[float] = []
        probability, previous_level, rate = 1.0, -1, 1.0
        for level in confidences:
            if level != previous_level:
                previous_level, rate = level, self.rate(level)
            probability *= rate
            if probability < MIN_PROBABILITY:
                break
            probabilities.append(probability)
        return probabilities

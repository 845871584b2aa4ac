"""`CostCurve`: how long a step of so many tokens takes, learnt from the steps that were run.

Owns a smoothed time per number of tokens. Reads no clock: seconds are told. Used by `SpeculationController`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

EXACT = 16  # up to here every number of tokens has a place of its own; beyond, numbers within an eighth share one
STALE = 128  # steps after which a plain step is measured again, and half of what another costs more is believed
_HEAVIEST = 32  # so many measurements of a place are as good as any more
_NEW, _REDRAW = 4, 16  # after so many measurements of a place, a curve serves for so many steps
_HICCUP = 1.5  # what takes so many times what it did was disturbed
# What disturbs a step makes it longer, never shorter: short times are believed sooner than long ones.
_SHORTER, _LONGER = 0.2, 0.1


def smoothed(old: float, new: float, count: int = 1 << 30) -> float:
    """The new estimate of a time after the `count`-th measurement."""
    return old + max(_SHORTER if new < old else _LONGER, 1 / count) * (new - old)


class _Place:
    """A smoothed (tokens, seconds), and the number of the step that last told something."""

    __slots__ = ("count", "seconds", "tokens", "told")

    def __init__(self) -> None:
        self.count, self.told = 0, 0
        self.tokens = self.seconds = 0.0

    def learn(self, tokens: int, seconds: float, now: int) -> None:
        """One more step; what is stale weighs as much as two."""
        self.count = 1 + (self.count if now - self.told < STALE else min(self.count, 2))
        self.told = now
        self.tokens += max(_LONGER, 1 / self.count) * (tokens - self.tokens)
        if self.count > _NEW:
            seconds = min(seconds, _HICCUP * self.seconds)
        self.seconds = smoothed(self.seconds, seconds, self.count)


class CostCurve:
    """Seconds by tokens: rising, linear between what was measured, and linear beyond.

    Steps with drafts have places of their own: however few there are, such a step does more than a plain one.

    What was not measured lately is taken to cost ever less beyond a step that was, so that it gets another chance.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, bool], _Place] = {}
        self._steps = 0
        self._seconds: list[float] = []

    def record(self, tokens: int, seconds: float, drafted: bool = False) -> None:
        """A step of `tokens` tokens, drafts among them or not, took so long."""
        if seconds <= 0 or tokens < 1:
            return
        self._steps += 1
        place = self._places.setdefault((_place_of(tokens), drafted), _Place())
        place.learn(tokens, seconds, self._steps)
        if place.count <= _NEW or self._steps % _REDRAW == 0:
            self._seconds = []

    def is_known(self, tokens: int, within: int = STALE) -> bool:
        """Whether a step of about so many tokens, none of them a draft, was among the last `within` ones."""
        place = self._places.get((_place_of(tokens), False))
        return place is not None and self._steps - place.told < within

    @property
    def reach(self) -> int:
        """Up to how many tokens it may be trusted: half as many again as were run lately."""
        return int(1.5 * max((place.tokens for place in self._places.values() if self._is_fresh(place)), default=0)) + 2

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens takes; 0 while nothing is known."""
        return self.upto(tokens)[tokens]

    def upto(self, tokens: int) -> list[float]:
        """The same for 0 to at least `tokens`, as a list that the caller must not change."""
        if len(self._seconds) <= tokens:
            self._seconds = self._curve(2 * tokens)
        return self._seconds

    def _is_fresh(self, place: _Place) -> bool:
        return self._steps - place.told < STALE

    def _curve(self, most: int) -> list[float]:
        points = _rising(self._points())
        if len(points) < 2:
            return [points[0][1] if points else 0.0] * (most + 1)
        return [_interpolate(points, tokens) for tokens in range(most + 1)]

    def _points(self) -> list[tuple[float, float, int]]:
        """(tokens, seconds, weight) of all places, stale ones nearer to the last fresh one before them."""
        found, base = list[tuple[float, float, int]](), 0.0
        for place in sorted(self._places.values(), key=lambda place: (place.tokens, place.seconds)):
            seconds, weight = place.seconds, 1
            if self._is_fresh(place):
                base, weight = seconds, min(place.count, _HEAVIEST)
            elif seconds > base > 0.0:
                seconds = base + (seconds - base) * 0.5 ** ((self._steps - place.told) / STALE)
            found.append((place.tokens, seconds, weight))
        return found


def _place_of(tokens: int) -> int:
    if tokens <= EXACT:
        return tokens
    power = tokens.bit_length() - 4
    return (tokens >> power << power) + power  # its first four bits


def _rising(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """(tokens, seconds) with seconds that never fall: neighbours that do get their mean (isotonic regression [1]).

    [1] Barlow et al. 1972, pool adjacent violators.
    """
    pools: list[tuple[float, int, list[float]]] = []  # seconds, their weight, and whose they are
    for tokens, seconds, weight in points:
        members = [tokens]
        while pools and pools[-1][0] >= seconds:
            other, more, others = pools.pop()
            seconds = (other * more + seconds * weight) / (more + weight)
            weight, members = more + weight, others + members
        pools.append((seconds, weight, members))
    return [(tokens, seconds) for seconds, _, members in pools for tokens in members]


def _interpolate(points: Sequence[tuple[float, float]], tokens: int) -> float:
    right = min(max(1, bisect_left(points, (float(tokens), 0.0))), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    if tokens < x0 or x0 == x1:
        return y0
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

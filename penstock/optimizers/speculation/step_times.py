"""`StepTimeCurve`: how long a step of a given number of tokens takes, measured on the steps that ran.

Owns a smoothed time per number of tokens. Reads no clock: seconds are arguments. Used by `SpeculationController`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

EXACT = 16  # up to here every number of tokens has its own bucket; beyond, numbers within an eighth share one
STALE = 128  # steps after which a plain step is measured again, and the extra cost of an old measurement is halved
_MAX_WEIGHT = 32  # further measurements of a bucket add no weight
_NEW, _REDRAW = 4, 16  # once a bucket has more than _NEW measurements, a curve is reused for _REDRAW steps
_OUTLIER = 1.5  # a time that is so many times the estimate was disturbed
# Disturbances make a step longer, never shorter: shorter times change the estimate faster than longer ones.
_SHORTER, _LONGER = 0.2, 0.1


def smoothed(estimate: float, seconds: float, count: int = 1 << 30) -> float:
    """The new estimate of a time after the `count`-th measurement."""
    return estimate + max(_SHORTER if seconds < estimate else _LONGER, 1 / count) * (seconds - estimate)


class _Bucket:
    """A smoothed (tokens, seconds), and the number of the step that last measured it."""

    __slots__ = ("count", "seconds", "tokens", "updated_at")

    def __init__(self) -> None:
        self.count, self.updated_at = 0, 0
        self.tokens = self.seconds = 0.0

    def record(self, tokens: int, seconds: float, step: int) -> None:
        """Add a measurement; stale ones count as two."""
        self.count = 1 + (self.count if step - self.updated_at < STALE else min(self.count, 2))
        self.updated_at = step
        self.tokens += max(_LONGER, 1 / self.count) * (tokens - self.tokens)
        if self.count > _NEW:
            seconds = min(seconds, _OUTLIER * self.seconds)
        self.seconds = smoothed(self.seconds, seconds, self.count)


class StepTimeCurve:
    """Seconds by tokens: non-decreasing, linear between measurements, and linear beyond them.

    Steps with drafts have buckets of their own: however few drafts there are, such a step does more than a plain one.

    The extra cost of a stale measurement over a recent smaller one decays, so that such a step is tried again.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, bool], _Bucket] = {}
        self._num_steps = 0
        self._seconds: list[float] = []

    def record(self, tokens: int, seconds: float, drafted: bool = False) -> None:
        """A step of `tokens` tokens took `seconds`; `drafted` says whether drafts were among them."""
        if seconds <= 0 or tokens < 1:
            return
        self._num_steps += 1
        bucket = self._buckets.setdefault((_bucket_of(tokens), drafted), _Bucket())
        bucket.record(tokens, seconds, self._num_steps)
        if bucket.count <= _NEW or self._num_steps % _REDRAW == 0:
            self._seconds = []

    def is_known(self, tokens: int, within: int = STALE) -> bool:
        """Whether one of the last `within` steps had about so many tokens and no draft."""
        bucket = self._buckets.get((_bucket_of(tokens), False))
        return bucket is not None and self._num_steps - bucket.updated_at < within

    def expire(self, tokens: int) -> None:
        """Treat the time of a step of so many tokens without drafts as one that was measured long ago."""
        if (bucket := self._buckets.get((_bucket_of(tokens), False))) is not None:
            bucket.updated_at = self._num_steps - STALE

    @property
    def reach(self) -> int:
        """The number of tokens up to which the curve is reliable: half as many again as ran lately."""
        return (
            int(1.5 * max((bucket.tokens for bucket in self._buckets.values() if self._is_fresh(bucket)), default=0))
            + 2
        )

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens takes; 0 before the first measurement."""
        return self.up_to(tokens)[tokens]

    def up_to(self, tokens: int) -> list[float]:
        """The same for 0 to at least `tokens`, as a list that the caller must not change."""
        if len(self._seconds) <= tokens:
            self._seconds = self._curve(2 * tokens)
        return self._seconds

    def _is_fresh(self, bucket: _Bucket) -> bool:
        return self._num_steps - bucket.updated_at < STALE

    def _curve(self, max_tokens: int) -> list[float]:
        points = _non_decreasing(self._points())
        if len(points) < 2:
            return [points[0][1] if points else 0.0] * (max_tokens + 1)
        return [_interpolate(points, tokens) for tokens in range(max_tokens + 1)]

    def _points(self) -> list[tuple[float, float, int]]:
        """(tokens, seconds, weight) of all buckets; stale ones are moved toward the last fresh one before them."""
        points: list[tuple[float, float, int]] = []
        base = 0.0
        for bucket in sorted(self._buckets.values(), key=lambda bucket: (bucket.tokens, bucket.seconds)):
            seconds, weight = bucket.seconds, 1
            if self._is_fresh(bucket):
                base, weight = seconds, min(bucket.count, _MAX_WEIGHT)
            elif seconds > base > 0.0:
                seconds = base + (seconds - base) * 0.5 ** ((self._num_steps - bucket.updated_at) / STALE)
            points.append((bucket.tokens, seconds, weight))
        return points


def _bucket_of(tokens: int) -> int:
    if tokens <= EXACT:
        return tokens
    power = tokens.bit_length() - 4
    return (tokens >> power << power) + power  # its first four bits


def _non_decreasing(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """(tokens, seconds) with seconds that never fall: neighbours that do get their mean (isotonic regression [1]).

    [1] Barlow et al. 1972, pool adjacent violators.
    """
    pools: list[tuple[float, int, list[float]]] = []  # seconds, weight, and the tokens of the points in it
    for tokens, seconds, weight in points:
        members = [tokens]
        while pools and pools[-1][0] >= seconds:
            pool_seconds, pool_weight, pool_members = pools.pop()
            seconds = (pool_seconds * pool_weight + seconds * weight) / (pool_weight + weight)
            weight, members = pool_weight + weight, pool_members + members
        pools.append((seconds, weight, members))
    return [(tokens, seconds) for seconds, _, members in pools for tokens in members]


def _interpolate(points: Sequence[tuple[float, float]], tokens: int) -> float:
    right = min(max(1, bisect_left(points, (float(tokens), 0.0))), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    if tokens < x0 or x0 == x1:
        return y0
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

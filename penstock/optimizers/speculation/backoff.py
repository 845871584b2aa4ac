"""`Backoff`: pauses speculation where it loses time, for longer after each failed attempt.

Owns a balance of what speculation saved and cost, and the length of the next pause: repeated attempts cost next to
nothing. Used by `SpeculationController`: one for each range of batch sizes, and one for each sequence of a draft model.
"""

from __future__ import annotations


class Backoff:
    """Pauses once `limit` is lost: for `min_pause` steps at first, `max_pause` at most. Gains count up to `limit`."""

    __slots__ = ("_balance", "_decay", "_limit", "_max_pause", "_min_pause", "_next_pause", "_steps_left")

    def __init__(self, limit: float, min_pause: int, max_pause: int) -> None:
        self._limit = limit
        self._min_pause, self._max_pause = min_pause, max_pause
        self._decay = 1.0 - 1.0 / max_pause
        self._next_pause = min_pause
        self._steps_left = 0
        self._balance = 0.0

    def allows_step(self) -> bool:
        """Whether to speculate in the next step; call it once per step."""
        self._steps_left = max(0, self._steps_left - 1)
        return not self._steps_left

    @property
    def is_paused(self) -> bool:
        """Whether the next step is part of a pause."""
        return self._steps_left > 1

    def record(self, saving: float) -> None:
        """One step saved so much, in the unit of `limit`; negative where a plain step would have been better."""
        self._balance = min(self._limit, self._balance * self._decay + saving)
        if self._balance >= self._limit:
            self._next_pause = self._min_pause
        elif self._balance < -self._limit:
            self._balance, self._steps_left = 0.0, self._next_pause
            self._next_pause = min(2 * self._next_pause, self._max_pause)

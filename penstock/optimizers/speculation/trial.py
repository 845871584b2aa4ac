"""`Trial`: whether speculation pays, in what it saved and cost so far; where it does not, it rests for a while.

Owns a balance, and when to try again: what loses is left alone, for longer each time, so that trying costs next to
nothing. Used by `SpeculationController`: one for each size of batch, and one for each sequence of a draft model.
"""

from __future__ import annotations


class Trial:
    """Rests when `limit` was lost, for `shortest` steps at first and `longest` at most. As much won is remembered."""

    __slots__ = ("_balance", "_keep", "_limit", "_longest", "_next", "_rest", "_shortest")

    def __init__(self, limit: float, shortest: int, longest: int) -> None:
        self._limit = limit
        self._shortest, self._longest = shortest, longest
        self._keep = 1.0 - 1.0 / longest
        self._next = shortest
        self._rest = 0
        self._balance = 0.0

    def may_go_on(self) -> bool:
        """Whether to speculate in the next step; asked once per step."""
        self._rest = max(0, self._rest - 1)
        return not self._rest

    def record(self, saved: float) -> None:
        """One step saved so much, in whatever unit `limit` has; negative where a plain one would have been better."""
        self._balance = min(self._limit, self._balance * self._keep + saved)
        if self._balance >= self._limit:
            self._next = self._shortest
        elif self._balance < -self._limit:
            self._balance, self._rest = 0.0, self._next
            self._next = min(2 * self._next, self._longest)

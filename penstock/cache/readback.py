"""`ReadBack`: whether reading blocks back from the host beats computing them again, by the times of recent steps.

Owns a window of step times: seconds per token moved, and per token computed while prefilling. Never reads a clock.
Called by `PrefixCache`; the comparison itself is a pure function.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from penstock.step import StepPlan

WINDOW = 64  # steps of each kind
TOKENS_PER_PREFILL = 4  # a step with at least as many tokens per row spends its time on prompts


def reading_is_cheaper(num_read: int, num_gained: int, read_s: float, compute_s: float) -> bool:
    """Whether reading `num_read` tokens at `read_s` each takes less than computing `num_gained` at `compute_s` each.

    More may be gained than is read: blocks that are still in the cache may follow those that are read back.
    """
    return num_read * read_s < num_gained * compute_s


class TokenTime:
    """Mean seconds per token over the last `WINDOW` records: total over total."""

    def __init__(self) -> None:
        self._records: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def record(self, num_tokens: int, seconds: float) -> None:
        """Add the tokens and seconds of one step."""
        self._records.append((num_tokens, seconds))

    @property
    def seconds_per_token(self) -> float | None:
        """None before the first record."""
        if not self._records:
            return None
        return sum(seconds for _, seconds in self._records) / sum(tokens for tokens, _ in self._records)


class ReadBack:
    """Until both times are known, reading back counts as cheaper, so that it gets measured."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.moving = TokenTime()
        self.computing = TokenTime()

    def learn(self, plan: StepPlan, timings_s: Mapping[str, float]) -> None:
        """Record a step: seconds of its "swap" (moves both ways), "forward" pass and "sample".

        A device computes asynchronously until its tokens are read, so only steps that sample measure its time.
        """
        num_moved = (len(plan.swaps_out) + len(plan.swaps_in)) * self._block_size
        if num_moved and "swap" in timings_s:
            self.moving.record(num_moved, timings_s["swap"])
        is_prefill = plan.num_tokens >= TOKENS_PER_PREFILL * len(plan.rows)
        if "forward" in timings_s and is_prefill and any(row.samples for row in plan.rows):
            self.computing.record(plan.num_tokens, timings_s["forward"] + timings_s.get("sample", 0.0))

    def pays_off(self, num_read: int, num_gained: int) -> bool:
        """Whether to read `num_read` tokens back in order not to compute `num_gained`."""
        read_s, compute_s = self.moving.seconds_per_token, self.computing.seconds_per_token
        if read_s is None or compute_s is None:
            return True
        return reading_is_cheaper(num_read, num_gained, read_s, compute_s)

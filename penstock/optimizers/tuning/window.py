"""`StepWindow`: the latest step records, with a part of their own for steps without a prompt.

Owns the records and, for more steps than these, the time of each relative to similar steps. Judges nothing. Filled and
read by the engine's tuning, once a step.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from penstock.optimizers.tuning.step_costs import MIN_S
from penstock.step import StepRecord

# Steps of streams alone have a part of their own, so that a series of long prompts does not push out the last of them.
NUM_PLAIN, NUM_MIXED = 64, 128
NUM_SCATTER = 1024  # an event of one step in a hundred needs many steps to be seen
NUM_SIMILAR = 8  # previous steps of its kind that a step is compared with


class StepWindow:
    """`scatter` has the times of the last `NUM_SCATTER` steps relative to their predecessors of the same kind."""

    def __init__(self) -> None:
        self._plain: deque[tuple[int, StepRecord]] = deque(maxlen=NUM_PLAIN)
        self._mixed: deque[tuple[int, StepRecord]] = deque(maxlen=NUM_MIXED)
        self.scatter: deque[float] = deque(maxlen=NUM_SCATTER)
        self.num_steps = 0

    def add(self, record: StepRecord) -> None:
        """Append one step."""
        kind = self._mixed if record.prompt_tokens else self._plain
        similar = [kind[-i][1].seconds for i in range(1, min(NUM_SIMILAR, len(kind)) + 1)]
        if record.streams and len(similar) == NUM_SIMILAR:
            self.scatter.append(record.seconds / max(MIN_S, median(similar)))
        self.num_steps += 1
        kind.append((self.num_steps, record))

    def records(self) -> list[StepRecord]:
        """The steps, oldest first."""
        return [record for _, record in sorted([*self._plain, *self._mixed])]

    @property
    def steps_since_plain(self) -> int:
        """Steps since the last one of streams alone."""
        return self.num_steps - (self._plain[-1][0] if self._plain else 0)

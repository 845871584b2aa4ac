"""`Window`: the latest step records, kept so that every kind of step has its say.

Owns the records and, for longer than these, by how much steps took longer than their like. Judges nothing. Filled and
read by the engine's tuning, once a step.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from penstock.optimizers.tuning.step_costs import LEAST_S
from penstock.step import StepRecord

# Steps of streams alone are kept apart, so that a row of long prompts does not push the last of them out.
PLAIN, MIXED = 64, 128
SCATTER = 1024  # one in a hundred needs many to be seen
LIKE = 8  # steps before one, of its kind, that it is compared with


class Window:
    """`scatter` holds how many times what its latest like took each of the last `SCATTER` steps took, oldest first."""

    def __init__(self) -> None:
        self._plain: deque[tuple[int, StepRecord]] = deque(maxlen=PLAIN)
        self._mixed: deque[tuple[int, StepRecord]] = deque(maxlen=MIXED)
        self.scatter: deque[float] = deque(maxlen=SCATTER)
        self.num_steps = 0

    def add(self, record: StepRecord) -> None:
        """Take in one step."""
        kind = self._mixed if record.prompt_tokens else self._plain
        like = [kind[-i][1].seconds for i in range(1, min(LIKE, len(kind)) + 1)]
        if record.streams and len(like) == LIKE:
            self.scatter.append(record.seconds / max(LEAST_S, median(like)))
        self.num_steps += 1
        kind.append((self.num_steps, record))

    def records(self) -> list[StepRecord]:
        """The steps, oldest first."""
        return [record for _, record in sorted([*self._plain, *self._mixed])]

    @property
    def since_plain(self) -> int:
        """Steps since the last one of streams alone."""
        return self.num_steps - (self._plain[-1][0] if self._plain else 0)

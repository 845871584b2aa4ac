"""`Masks`: which tokens each row of a step may sample, computed while the forward pass runs.

Owns the bits, and the hand-over between two threads: the engine's thread fills, the model's thread waits before it
samples. Made for a plan, or by the sampler for rows that were left out of its masks; used once.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator

from penstock.constraint import MaskFiller, MaskRequest
from penstock.errors import ExecutionError, GrammarError, described
from penstock.step import Row, StepPlan

_POLL_S = 0.5  # how often a waiting thread runs a line of Python, at which a process that exits can stop it
_BITS = 32


class Masks:
    """Masks of the constrained rows of a plan: `num_words` words each, the bit of token t in word t // 32.

    A row with drafts has one for every position that is sampled, and a row's siblings have their own. Until `wait` has
    returned, only `fill` accesses them.
    """

    def __init__(self, rows: list[Row], filler: MaskFiller) -> None:
        self._filler = filler
        self._first = dict[int, int]()
        self._requests: list[MaskRequest] = []
        num_masks = 0
        for row in rows:
            assert row.constraint is not None
            self._first[row.seq_id] = num_masks
            self._requests.append(MaskRequest(row.constraint, num_masks, row.draft))
            num_masks += 1 + len(row.draft)
        self.num_words = filler.num_words
        self.bits = array("i", [-1]) * (num_masks * self.num_words)
        self._errors = dict[int, GrammarError]()
        self._fault: BaseException | None = None
        self._filled = threading.Event()

    @classmethod
    def of(cls, plan: StepPlan, *, checks_candidates: bool = False) -> Masks | None:
        """Masks for the rows of a plan that sample under a constraint; None if there are none.

        With `checks_candidates`, the sampler asks the constraints of greedy rows for the first of its candidates that
        they allow, so the rows whose constraints prefer that are left out.
        """
        rows = [row for row in _constrained(plan) if not (checks_candidates and _prefers_candidates(row))]
        return cls.of_rows(rows) if rows else None

    @classmethod
    def of_rows(cls, rows: list[Row]) -> Masks:
        """Masks for these rows, of which there is at least one; each has a constraint."""
        assert rows[0].constraint is not None
        return cls(rows, rows[0].constraint.filler)

    def fill(self) -> None:
        """Compute every mask. Never raises: a fault of the whole step reaches `wait`, that of a row its result."""
        try:
            errors = self._filler.fill(self._requests, self.bits)
            seq_ids = list(self._first)
            self._errors = {seq_ids[place]: error for place, error in errors.items()}
        except BaseException as error:
            self._fault = error
        finally:
            self._filled.set()

    def wait(self) -> None:
        """Block until the masks are filled. Raises `ExecutionError` if that failed."""
        while not self._filled.wait(_POLL_S):
            pass
        if self._fault is not None:
            raise ExecutionError(f"the grammar masks of the step failed: {described(self._fault)}") from self._fault

    def has(self, row: Row) -> bool:
        """Whether the row was not left out."""
        return row.seq_id in self._first

    def index(self, row: Row) -> int:
        """The number of the mask for the token at the row's end."""
        return self._first[row.seq_id] + len(row.draft)

    def error(self, row: Row) -> GrammarError | None:
        """Why a row has no mask, if it has none."""
        return self._errors.get(row.seq_id)

    def nearest(self, row: Row, place: int, token: int) -> int:
        """The token if the row may sample it after `place` draft tokens; otherwise the first that it may, or -1."""
        begin = (self._first[row.seq_id] + place) * self.num_words
        words = self.bits[begin : begin + self.num_words]
        if token // _BITS < len(words) and words[token // _BITS] >> (token % _BITS) & 1:
            return token
        lowest = ((place, word) for place, word in enumerate(words) if word)
        return next((place * _BITS + (word & -word).bit_length() - 1 for place, word in lowest), -1)


def _prefers_candidates(row: Row) -> bool:
    """Whether a row takes its greatest allowed logit, after no rule, and its constraint may be asked for it."""
    params = row.params
    is_greedy = params.greedy and not params.is_ruled and row.end - row.prompt_len >= params.num_held
    return is_greedy and not row.draft and row.constraint is not None and row.constraint.prefers_candidates


def _constrained(plan: StepPlan) -> Iterator[Row]:
    for row in plan.rows:
        if row.samples:
            if row.constraint is not None:
                yield row
            yield from (sibling for sibling in row.siblings if sibling.constraint is not None)

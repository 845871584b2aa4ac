"""`Step` and its `Budget`: what one step has come to and may still take. They die with the step.

Own the step's tokens, rows and logit rows. Never change a sequence, the cache or the running set. Made and spent by
`Scheduler.plan`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from penstock.cache.manager import CacheManager
from penstock.scheduling.limits import Limits
from penstock.scheduling.running import RunningSet
from penstock.sequence import Sequence, Status
from penstock.step import Row


def is_decoding(seq: Sequence) -> bool:
    """Whether one token, besides drafts, takes it to its next sample."""
    return seq.computed + 1 >= len(seq.tokens)


def takes_draft(seq: Sequence) -> bool:
    """Whether guesses may follow its newest token in the next step, which is all that it lacks.

    Not before its first draw, which others may share, and never in a beam, whose row means more than its next token.
    """
    last = len(seq.tokens) - 1
    waits = seq.status is Status.RUNNING and not seq.in_flight
    return waits and seq.computed == last >= seq.prompt_len and not seq.params.use_beam_search


def scores_prompt(seq: Sequence) -> bool:
    """Whether its next tokens need logits at every position."""
    return seq.params.prompt_logprobs is not None and seq.computed + 1 < seq.prompt_len


class Budget:
    """Counts down. `reserved` holds back one token, with its logits, for each decoding sequence yet to come."""

    __slots__ = ("logit_rows", "reserved", "rows", "tokens")

    def __init__(self, tokens: int, rows: int, logit_rows: int | None, num_decoding: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self.logit_rows = tokens if logit_rows is None else logit_rows
        self.reserved = min(num_decoding, self.tokens, self.rows, self.logit_rows)

    def is_open(self, num_leaving: int = 0) -> bool:
        """Whether one more row gets at least one token with logits, once `num_leaving` decoding sequences left."""
        return min(self.tokens, self.rows, self.logit_rows) > max(0, self.reserved - num_leaving)

    def claim(self) -> None:
        """The turn of a decoding sequence has come, or it left: what was held back for it is free."""
        if self.reserved:
            self.reserved -= 1

    def grant(self, want: int, num_draft: int, all_logits: bool) -> int:
        """How many of `want` tokens (the last `num_draft` of them drafts) a row gets; 0 for none.

        A row needs logits of the newest token and of each draft, or, with `all_logits`, of every token.
        """
        if not self.rows:
            return 0
        logit_rows = self.logit_rows - self.reserved
        most = logit_rows if all_logits else want - num_draft - 1 + logit_rows
        return max(0, min(want, self.tokens - self.reserved, most))

    def draw(self) -> bool:
        """Spend the token, with its logits, that is held back for a decoding sequence; False if none is."""
        if not self.reserved:
            return False
        self.reserved -= 1
        self.tokens -= 1
        self.rows -= 1
        self.logit_rows -= 1
        return True

    def spend(self, tokens: int, logit_rows: int) -> None:
        """One row was planned."""
        self.tokens -= tokens
        self.rows -= 1
        self.logit_rows -= logit_rows


class Step:
    """What `plan` has come to so far."""

    __slots__ = ("budget", "max_rows", "max_running", "now", "rows")

    def __init__(self, now: float, budget: Budget, max_running: int) -> None:
        self.now = now
        self.budget = budget
        self.max_rows = budget.rows
        self.max_running = max_running
        self.rows: list[Row] = []

    def has_place(self, seq: Sequence, num_running: int, num_expected: int) -> bool:
        """Whether a waiting sequence may join those that run, and those that are expected to.

        One that has drawn tokens is no newcomer: the tuner may not take it back, and its mates may wait for it. A
        newcomer finds rows for all its beams, or nobody who runs: beams that do not share a step compute anew.
        """
        if seq.num_generated:
            return num_running < self.max_rows
        fits = num_running + num_expected + seq.width <= self.max_rows
        return not num_running or (fits and num_running < self.max_running)

    def grant(self, seq: Sequence) -> int:
        """How many tokens this sequence gets; 0 for none."""
        return self.budget.grant(seq.todo, len(seq.draft), scores_prompt(seq))

    def decode(self, seq: Sequence, cache: CacheManager) -> bool:
        """Plan a sequence that lacks only its newest token, if a token is held back and a slot is there for it.

        The short way to what `grant` and `add` do, for most rows of most steps. False: nothing was planned.
        """
        length = len(seq.tokens)
        if seq.computed + 1 != length or seq.draft or length == seq.prompt_len:
            return False  # whose first token it is to be, others may draw with
        if not cache.has_slot(seq) or not self.budget.draw():
            return False
        birth = (seq.params, seq.prompt_len, seq.stop_ids, seq.seed, seq.sample_index)
        self.rows.append(Row(seq.id, seq.tokens, length - 1, length, seq.blocks, True, *birth))
        return True

    def add(self, seq: Sequence, num_tokens: int, siblings: Iterable[Sequence] = ()) -> None:
        """Plan the next tokens of a sequence whose blocks are there; `siblings` draw with it, if it samples."""
        start, length = seq.computed, len(seq.tokens)
        end = start + num_tokens
        self.budget.spend(num_tokens, num_tokens if scores_prompt(seq) else max(0, end - length + 1))
        draft = seq.draft[: end - length] if end > length else ()
        samples = end >= length
        others = tuple(_row(sibling, end, end, True) for sibling in siblings) if samples and siblings else ()
        self.rows.append(_row(seq, start, end, samples, draft, others))


def _row(
    seq: Sequence, start: int, end: int, samples: bool, draft: tuple[int, ...] = (), siblings: tuple[Row, ...] = ()
) -> Row:
    birth = (seq.params, seq.prompt_len, seq.stop_ids, seq.seed, seq.sample_index)
    return Row(seq.id, seq.tokens, start, end, seq.blocks, samples, *birth, draft, siblings)


def begin(now: float, running: RunningSet, limits: Limits, max_logit_rows: int | None) -> Step:
    """A step with nothing in it, within the limits of this moment."""
    num_decoding = sum(map(is_decoding, running))
    tokens = limits.step_tokens if limits.tuned is None else limits.tuned_tokens(*_load(running, num_decoding))
    return Step(now, Budget(tokens, limits.max_batch_size, max_logit_rows, num_decoding), limits.max_running)


def _load(running: RunningSet, num_decoding: int) -> tuple[int, int]:
    """Tokens of the streams, drafts included, and how far the first prompt beside them has come."""
    drafted = sum(len(seq.draft) for seq in running)
    if num_decoding == len(running):
        return num_decoding + drafted, 0
    return num_decoding + drafted, next(seq.computed for seq in running if not is_decoding(seq))


def has_room(
    seq: Sequence,
    step: Step,
    running: RunningSet,
    cache: CacheManager,
    leaving: Collection[Sequence] = (),
    num_expected: int = 0,
) -> bool:
    """Whether a waiting sequence can start in this step, if those `leaving` gave up their places.

    `num_expected` others will want rows beside those that stay. All its tokens must fit, and one more block for every
    running sequence, which may soon need it: without that margin a start would only preempt somebody a few steps later.
    """
    staying = len(running) - len(leaving)
    if not step.has_place(seq, staying, num_expected) or not step.budget.is_open(sum(map(is_decoding, leaving))):
        return False
    return cache.fits(seq, staying - cache.num_freed_by(leaving))

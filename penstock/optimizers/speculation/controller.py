"""`SpeculationController`: how many tokens to guess for each sequence, if any.

Owns what was learnt: how often guesses are right, per request and kind, and what steps cost by their tokens. Pure and
clockless: times are told. Never drafts. Asked by the engine's loop before it plans a step, told after its commit.

A guess is worth its place in the step while it adds more tokens per second than it costs. All guesses of a step are
put in order of their chance, and the step takes as many as make the most expected tokens per second, by the measured
cost of a step of that size. So drafts are long where steps cost the same for a few tokens more, short in a full
batch, and none where they do not pay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from penstock.optimizers.speculation.chances import Chances
from penstock.optimizers.speculation.costs import STALE, CostCurve, smoothed
from penstock.optimizers.speculation.drafter import Ask, Draft
from penstock.optimizers.speculation.trial import Trial
from penstock.sequence import Sequence
from penstock.step import StepPlan, StepResult

MARGIN = 1.06  # so much faster than plain a step must promise to be
_CLEAR, _CLOSE = 1.5, 12  # where it promises less than the first, every so many steps a plain one is measured
_FEW_TRIES, _REST = 8, 8  # asked in vain so often, a drafter is asked only once in so many tokens
_SHORT_REST, _COMMON, _POOR = 4, 2, 0.8  # the same, at once, where a guess of a common kind hardly pays
_ASIDE = 3  # tokens of a draft that are kept to be judged later
# Plain steps that may be lost before a rest, steps of the shortest rest and the longest: all with so many sequences,
# the same where a model drafts, and one sequence (in tokens) of a model's.
_ANY_LOSS, _COSTLY_LOSS, _OWN_LOSS = (4.0, 128, 512), (8.0, 256, 4096), (2.0, 16, 128)
_HICCUP = 3.0  # drafting that takes so many times what it does was disturbed
_EXPLORE = 0.7  # a draft goes a little further than pays by what is known, to learn what does


@dataclass(slots=True)
class _Known:
    """Of one sequence: its chances, the kinds of its offered draft, and a draft that only waits to be judged.

    `aside` is (length of the sequence, draft): not offered, but the tokens to come will tell how good it was.
    """

    chances: Chances
    trial: Trial
    kinds: tuple[int, ...] = ()
    aside: tuple[int, Draft] | None = None
    in_vain: int = 0
    rest_until: int = 0

    def choose(self, length: int, draft: Draft, count: int, rest: int) -> None:
        """The first `count` guesses of a draft are offered. Without any, the drafter is left alone for a while."""
        self.kinds = draft.kinds[:count]
        self.in_vain = 0 if count else self.in_vain + bool(draft.tokens)
        if count:
            return
        if draft.tokens:
            self.aside = length, Draft(draft.tokens[:_ASIDE], draft.kinds[:_ASIDE])
        self.rest_until = length + (_REST if self.in_vain >= _FEW_TRIES else rest)

    def judge_aside(self, tokens: SequenceOf[int]) -> None:
        """See how good a draft was that was not offered."""
        if self.aside is None:
            return
        length, draft = self.aside
        came = tokens[length : length + len(draft.tokens)]
        right = 0
        while right < len(came) and came[right] == draft.tokens[right]:
            right += 1
        if came:
            self.chances.learn(draft.kinds[: len(came)], right)
        self.aside = None


@dataclass(slots=True)
class _Load:
    """What is known of steps with about so many sequences."""

    trial: Trial
    draft_step_s: float = 0.0


class SpeculationController:
    """`costly` says that drafting takes a model's time: then only drafts that pay for that too are asked for."""

    def __init__(self, costly: bool) -> None:
        self._costly = costly
        self._costs = CostCurve()
        self._everybody = Chances(weight=2.0, memory=1000)
        self._known: dict[int, _Known] = {}
        self._loads: dict[int, _Load] = {}
        self._asked: list[int] = []  # sequence ids, for the step to come
        self._drafting_s = 0.0
        self._promise = 1.0  # of the last step that was chosen for, against a plain one

    # Before a step.

    def asks(self, seqs: SequenceOf[Sequence], most: int) -> list[Ask]:
        """What to ask the drafter for the sequences that decode in the next step; at most `most` tokens for each."""
        self._asked, self._drafting_s = [], 0.0
        num_rows = len(seqs)
        if not self._costs.is_known(num_rows, STALE if self._promise > _CLEAR else _CLOSE):
            return []  # nothing to compare with
        if not self._load(num_rows).trial.may_go_on():
            return []
        least = self._least_worth(num_rows) if self._costly else 0.0
        found = [ask for seq in seqs if (ask := self._ask(seq, most, least)) is not None]
        self._asked = [ask.seq.id for ask in found]
        return found

    def choose(
        self, asks: SequenceOf[Ask], drafts: SequenceOf[Draft], num_rows: int
    ) -> list[tuple[int, tuple[int, ...]]]:
        """Which part of each draft to offer, as (sequence id, tokens), for a step of `num_rows` decoding sequences."""
        known = [self._known[ask.seq.id] for ask in asks]
        gains = [one.chances.gains(draft.kinds) for one, draft in zip(known, drafts, strict=True)]
        least = self._least_gain(sorted((gain for some in gains for gain in some), reverse=True), num_rows)
        rest = _SHORT_REST if self._price(num_rows) > _POOR * self._everybody.of(_COMMON) else 0
        found = []
        for ask, draft, one, some in zip(asks, drafts, known, gains, strict=True):
            count = len(some) if not some or some[-1] >= least else sum(gain >= least for gain in some)
            one.choose(ask.seq.length, draft, count, rest)
            if count:
                found.append((ask.seq.id, draft.tokens[:count]))
        return found

    def record_drafting(self, num_rows: int, depth: int, seconds: float) -> None:
        """Drafting for the next step took so long, for up to `depth` tokens in a row of `num_rows` sequences."""
        load, step_s = self._load(num_rows), seconds / max(1, depth)
        load.draft_step_s = smoothed(load.draft_step_s, step_s) if load.draft_step_s else step_s
        self._drafting_s = min(seconds, _HICCUP * max(1, depth) * load.draft_step_s)

    # After a step.

    def record_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """A step was committed. It took `seconds`, without the drafting before it."""
        drafted, accepted = 0, dict[int, int]()
        for row, out in zip(plan.rows, result.rows, strict=True):
            if row.draft and out.error is None:
                drafted += len(row.draft)
                accepted[row.seq_id] = out.num_accepted
                self._judge(row.seq_id, len(row.draft), out.num_accepted)
        num_rows = len(plan.rows)
        # A step with a prefill in it compares with nothing.
        if plan.num_tokens == num_rows + drafted and all(row.samples for row in plan.rows):
            self._costs.record(plan.num_tokens, seconds, drafted > 0)
            if self._asked:
                self._record_trials(num_rows, plan.num_tokens, accepted)

    def forget_all_but(self, live: Iterable[int]) -> list[int]:
        """Drop what is known of sequences that ended; their ids."""
        gone = self._known.keys() - set(live)
        for seq_id in gone:
            del self._known[seq_id]
        return list(gone)

    @property
    def num_known(self) -> int:
        """How many sequences something is remembered of."""
        return len(self._known)

    def _record_trials(self, num_rows: int, num_tokens: int, accepted: dict[int, int]) -> None:
        """Accepted tokens against the tokens that plain steps make in the time it took to come by them.

        By what such steps take on average: a hiccup of the machine is nobody's fault.
        """
        curve = self._costs.upto(num_tokens)
        cost = num_rows * (curve[num_tokens] - curve[num_rows] + self._drafting_s) / curve[num_rows]
        self._load(num_rows).trial.record((sum(accepted.values()) - cost) / num_rows)
        for seq_id in self._asked if self._costly else ():
            if seq_id in self._known:
                self._known[seq_id].trial.record(accepted.get(seq_id, 0) - cost / len(self._asked))

    def _load(self, num_rows: int) -> _Load:
        size = num_rows.bit_length()
        if size not in self._loads:
            self._loads[size] = _Load(Trial(*(_COSTLY_LOSS if self._costly else _ANY_LOSS)))
        return self._loads[size]

    def _ask(self, seq: Sequence, most: int, least: float) -> Ask | None:
        known = self._known.get(seq.id)
        if known is None:
            chances = Chances(self._everybody, weight=4.0, memory=48)
            known = self._known[seq.id] = _Known(chances, Trial(*_OWN_LOSS))
        if seq.length < known.rest_until or not known.trial.may_go_on():
            return None
        known.judge_aside(seq.tokens)
        own = seq.params.speculation_length
        count = min(most, most if own is None else own, seq.max_len - seq.length - 1)
        if count < 1:
            return None
        return Ask(seq, count, known.chances.table() if self._costly else (), least)

    def _least_worth(self, num_rows: int) -> float:
        """The least chance of a guess that pays for its own making and for its place in the step."""
        draft_step_s = self._load(num_rows).draft_step_s
        return _EXPLORE * (self._price(num_rows) + draft_step_s / self._costs.seconds(num_rows))

    def _price(self, num_rows: int) -> float:
        """What one more token in a step costs, counted in tokens that plain steps make in that time."""
        curve = self._costs.upto(2 * num_rows)
        return (curve[2 * num_rows] - curve[num_rows]) / curve[num_rows]

    def _least_gain(self, gains: SequenceOf[float], num_rows: int) -> float:
        """The chance down to which the guesses make the most of the step. `gains` descend."""
        curve = self._costs.upto(num_rows + len(gains))
        plain = curve[num_rows] / num_rows
        best, least, tokens = MARGIN / plain, math.inf, float(num_rows)
        for place, gain in enumerate(gains[: max(0, self._costs.reach - num_rows)], num_rows + 1):
            tokens += gain
            rate = tokens / min(curve[place], plain * place)  # no token costs more than one of a plain step
            if rate > best:
                best, least = rate, gain
        self._promise = best * plain
        return least

    def _judge(self, seq_id: int, drafted: int, accepted: int) -> None:
        known = self._known.get(seq_id)
        if known is not None:
            known.chances.learn(known.kinds[:drafted], accepted)

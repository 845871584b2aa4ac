"""`SpeculationController`: decides how many draft tokens each sequence gets in the next step, if any.

Owns what was measured: acceptance rates per request and confidence level, and step times by number of tokens. Reads no
clock and never drafts. Asked by the engine's loop before it plans a step, given the results after its commit.

A draft token is worth its place in the step while it adds more tokens per second than it costs. All draft tokens of a
step are ordered by their probability of acceptance, and the step takes as many as maximise the expected tokens per
second, by the measured time of a step of that size. So drafts are long where a few more tokens cost almost nothing,
short in a full batch, and absent where they do not pay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from penstock.optimizers.speculation.acceptance import AcceptanceRates
from penstock.optimizers.speculation.backoff import Backoff
from penstock.optimizers.speculation.drafter import Draft, DraftRequest
from penstock.optimizers.speculation.step_times import STALE, StepTimeCurve, smoothed
from penstock.sequence import Sequence
from penstock.step import StepPlan, StepResult

MARGIN = 1.06  # minimum expected speedup over a plain step
# If the last expected speedup was below _CLEAR, a plain step is measured at least every _CLOSE steps.
_CLEAR, _CLOSE = 1.5, 12
# After _MAX_MISSES drafts of which nothing was offered, a sequence is drafted for once in _PAUSE tokens.
_MAX_MISSES, _PAUSE = 8, 8
# The same after a single one, for _SHORT_PAUSE tokens, if a token of confidence _COMMON_LEVEL costs more than
# _POOR times what it is expected to gain.
_SHORT_PAUSE, _COMMON_LEVEL, _POOR = 4, 2, 0.8
_MAX_WITHHELD = 3  # tokens of a draft that was not offered, kept to measure acceptance all the same
# Arguments of `Backoff`: the loss in plain steps before a pause, and the shortest and longest pause in steps. The first
# is for all batches of a size, the second for these where a draft model runs, the third for one sequence of a draft
# model, its loss in tokens.
_BATCH_BACKOFF, _MODEL_BACKOFF, _SEQUENCE_BACKOFF = (2.0, 128, 512), (8.0, 256, 4096), (2.0, 16, 128)
_MIN_GAIN = 0.02  # of a plain step, that each step with drafts has to save: measured gains are not exact
_OUTLIER = 3.0  # a drafting time that is so many times the estimate was disturbed
_EXPLORE = 0.7  # drafts are made a little longer than is known to pay, to measure whether they would


@dataclass(slots=True)
class _SequenceState:
    """One sequence: its acceptance rates, the confidences of its offered draft, and a draft that was not offered.

    `withheld` is (length of the sequence, draft): the tokens generated next show whether it would have been accepted.
    """

    rates: AcceptanceRates
    backoff: Backoff
    confidences: tuple[int, ...] = ()
    withheld: tuple[int, Draft] | None = None
    num_misses: int = 0
    pause_until: int = 0

    def choose(self, length: int, draft: Draft, count: int, pause: int) -> None:
        """The first `count` tokens of a draft are offered. If there are none, no draft is requested for a while."""
        self.confidences = draft.confidences[:count]
        self.num_misses = 0 if count else self.num_misses + bool(draft.tokens)
        if count:
            return
        if draft.tokens:
            self.withheld = length, Draft(draft.tokens[:_MAX_WITHHELD], draft.confidences[:_MAX_WITHHELD])
        self.pause_until = length + (_PAUSE if self.num_misses >= _MAX_MISSES else pause)

    def verify_withheld(self, tokens: SequenceOf[int]) -> None:
        """Compare a draft that was not offered with the tokens generated since."""
        if self.withheld is None:
            return
        length, draft = self.withheld
        generated = tokens[length : length + len(draft.tokens)]
        num_correct = 0
        while num_correct < len(generated) and generated[num_correct] == draft.tokens[num_correct]:
            num_correct += 1
        if generated:
            self.rates.record(draft.confidences[: len(generated)], num_correct)
        self.withheld = None


@dataclass(slots=True)
class _BatchState:
    """Steps whose batch sizes have the same number of bits."""

    backoff: Backoff
    draft_step_s: float = 0.0


class SpeculationController:
    """`costly` says that drafting takes a model's time: then a draft has to pay for that too."""

    def __init__(self, costly: bool) -> None:
        self._costly = costly
        self._step_times = StepTimeCurve()
        self._overall_rates = AcceptanceRates(weight=2.0, memory=1000)
        self._sequences: dict[int, _SequenceState] = {}
        self._batches: dict[int, _BatchState] = {}
        self._requested: list[int] = []  # sequence ids, for the next step
        self._drafting_s = 0.0
        self._expected_speedup = 1.0  # of the last step that drafts were chosen for, over a plain one

    # Before a step.

    def allows_step(self, num_rows: int) -> bool:
        """False while speculation pauses for batches of this size; call it once per step."""
        return self._batch(num_rows).backoff.allows_step()

    def requests(self, seqs: SequenceOf[Sequence], num_rows: int, max_tokens: int) -> list[DraftRequest]:
        """What to request of the drafter for `seqs`, of the `num_rows` in the next step; each `max_tokens` at most."""
        self._requested, self._drafting_s = [], 0.0
        if not self._step_times.is_known(num_rows, STALE if self._expected_speedup > _CLEAR else _CLOSE):
            return []  # there is no plain step to compare with
        min_acceptance = self._min_acceptance(num_rows) if self._costly else 0.0
        requests = [request for seq in seqs if (request := self._request(seq, max_tokens, min_acceptance)) is not None]
        self._requested = [request.seq.id for request in requests]
        return requests

    def choose(
        self, requests: SequenceOf[DraftRequest], drafts: SequenceOf[Draft], num_rows: int
    ) -> list[tuple[int, tuple[int, ...]]]:
        """Which part of each draft to offer, as (sequence id, tokens), for a step of `num_rows` decoding sequences."""
        states = [self._sequences[request.seq.id] for request in requests]
        probabilities = [
            state.rates.probabilities(draft.confidences) for state, draft in zip(states, drafts, strict=True)
        ]
        flat = sorted((p for row in probabilities for p in row), reverse=True)
        threshold = self._threshold(flat, num_rows) if flat else math.inf
        pause = _SHORT_PAUSE if self._token_cost(num_rows) > _POOR * self._overall_rates.rate(_COMMON_LEVEL) else 0
        offers: list[tuple[int, tuple[int, ...]]] = []
        for request, draft, state, row in zip(requests, drafts, states, probabilities, strict=True):
            count = len(row) if not row or row[-1] >= threshold else sum(p >= threshold for p in row)
            state.choose(request.seq.length, draft, count, pause)
            if count:
                offers.append((request.seq.id, draft.tokens[:count]))
        return offers

    def record_drafting(self, num_rows: int, depth: int, seconds: float) -> None:
        """Drafting for the next step took `seconds`: up to `depth` consecutive tokens for each of `num_rows` rows."""
        batch, step_s = self._batch(num_rows), seconds / max(1, depth)
        batch.draft_step_s = smoothed(batch.draft_step_s, step_s) if batch.draft_step_s else step_s
        self._drafting_s = min(seconds, _OUTLIER * max(1, depth) * batch.draft_step_s)

    # After a step.

    def record_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """A step was committed. It took `seconds`, without the drafting before it."""
        num_drafted, num_accepted = 0, dict[int, int]()
        for row, row_result in zip(plan.rows, result.rows, strict=True):
            if row.draft and row_result.error is None:
                num_drafted += len(row.draft)
                num_accepted[row.seq_id] = row_result.num_accepted
                self._record_acceptance(row.seq_id, len(row.draft), row_result.num_accepted)
        num_rows = len(plan.rows)
        # A step with a prefill in it compares with no other.
        if plan.num_tokens == num_rows + num_drafted and all(row.samples for row in plan.rows):
            self._step_times.record(plan.num_tokens, seconds, num_drafted > 0)
            if self._requested:
                self._record_savings(num_rows, plan.num_tokens, num_accepted)

    def forget_all_but(self, live: Iterable[int]) -> list[int]:
        """Drop the state of all other sequences; their ids."""
        ended = self._sequences.keys() - set(live)
        for seq_id in ended:
            del self._sequences[seq_id]
        return list(ended)

    @property
    def num_sequences(self) -> int:
        """How many sequences have a state."""
        return len(self._sequences)

    def _record_savings(self, num_rows: int, num_tokens: int, num_accepted: dict[int, int]) -> None:
        """Count accepted tokens against the tokens that plain steps make in the time spent on them.

        Times are those that such steps take on average, so that a disturbance of the machine counts for nothing.
        """
        curve = self._step_times.up_to(num_tokens)
        cost = num_rows * (curve[num_tokens] - curve[num_rows] + self._drafting_s) / curve[num_rows]
        backoff = self._batch(num_rows).backoff
        backoff.record((sum(num_accepted.values()) - cost) / num_rows - _MIN_GAIN)
        if backoff.is_paused:
            self._step_times.expire(num_rows)
        for seq_id in self._requested if self._costly else ():
            if seq_id in self._sequences:
                self._sequences[seq_id].backoff.record(num_accepted.get(seq_id, 0) - cost / len(self._requested))

    def _batch(self, num_rows: int) -> _BatchState:
        size = num_rows.bit_length()
        if size not in self._batches:
            self._batches[size] = _BatchState(Backoff(*(_MODEL_BACKOFF if self._costly else _BATCH_BACKOFF)))
        return self._batches[size]

    def _request(self, seq: Sequence, max_tokens: int, min_acceptance: float) -> DraftRequest | None:
        state = self._sequences.get(seq.id)
        if state is None:
            rates = AcceptanceRates(self._overall_rates, weight=4.0, memory=48)
            state = self._sequences[seq.id] = _SequenceState(rates, Backoff(*_SEQUENCE_BACKOFF))
        if seq.draft:  # tokens that a grammar forces
            state.confidences = ()
            return None
        if seq.length < state.pause_until or not state.backoff.allows_step():
            return None
        state.verify_withheld(seq.tokens)
        limit = seq.params.speculation_length
        count = min(max_tokens, max_tokens if limit is None else limit, seq.max_len - seq.length - 1)
        if count < 1:
            return None
        return DraftRequest(seq, count, state.rates.table() if self._costly else (), min_acceptance)

    def _min_acceptance(self, num_rows: int) -> float:
        """The least probability at which a draft token pays for being drafted and for its place in the step."""
        draft_step_s = self._batch(num_rows).draft_step_s
        return _EXPLORE * (self._token_cost(num_rows) + draft_step_s / self._step_times.seconds(num_rows))

    def _token_cost(self, num_rows: int) -> float:
        """The time of one more token in a step, in tokens that plain steps make in that time."""
        curve = self._step_times.up_to(2 * num_rows)
        return (curve[2 * num_rows] - curve[num_rows]) / curve[num_rows]

    def _threshold(self, probabilities: SequenceOf[float], num_rows: int) -> float:
        """The probability down to which draft tokens make the step most productive. `probabilities` descend."""
        curve = self._step_times.up_to(num_rows + len(probabilities))
        plain_s = curve[num_rows] / num_rows
        best_rate, threshold, tokens = MARGIN / plain_s, math.inf, float(num_rows)
        for place, probability in enumerate(probabilities[: max(0, self._step_times.reach - num_rows)], num_rows + 1):
            tokens += probability
            rate = tokens / min(curve[place], plain_s * place)  # no token costs more than one of a plain step
            if rate > best_rate:
                best_rate, threshold = rate, probability
        self._expected_speedup = best_rate * plain_s
        return threshold

    def _record_acceptance(self, seq_id: int, num_drafted: int, num_accepted: int) -> None:
        state = self._sequences.get(seq_id)
        if state is not None:
            state.rates.record(state.confidences[:num_drafted], num_accepted)

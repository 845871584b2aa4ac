"""`ModelDrafter`: a smaller model drafts, greedily, for all sequences together.

Owns the draft model's block tables and what it has computed of each sequence; a function runs the model itself. Runs on
the model's thread; `forget` comes from the engine's.

The draft is the model's most likely tokens, whatever the request's parameters: with draws tied to positions (see
`verification`) these are accepted most often. The probability of each token gives its confidence, and drafting ends
where the next token would not be worth the time to draft it.
"""

from __future__ import annotations

from array import array
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from penstock.optimizers.speculation.drafter import NUM_CONFIDENCE_LEVELS, Draft, DraftRequest
from penstock.sampling import SamplingParams
from penstock.step import Row, StepPlan

# Runs a step of the draft model: each row's most likely next token and its probability, None where it samples none.
DraftModel = Callable[[StepPlan], SequenceOf[tuple[int, float] | None]]

# Probabilities of a draft token, under the draft model, that separate the confidence levels.
EDGES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
assert len(EDGES) == NUM_CONFIDENCE_LEVELS - 1
# A sequence is drafted for if the draft model lacks at most so many tokens for each token still to be generated.
MAX_LAG = 8
_GREEDY = SamplingParams(temperature=0.0, max_tokens=1)


@dataclass(slots=True, eq=False)
class _SequenceState:
    """The draft model's view of one sequence: `tokens`, of which the first `computed` have their K/V in `blocks`.

    The first `num_settled` tokens are the sequence's; the ones after them are draft tokens.
    """

    tokens: list[int] = field(default_factory=list)
    blocks: array[int] = field(default_factory=lambda: array("i"))
    num_settled: int = 0
    computed: int = 0

    def update(self, tokens: SequenceOf[int]) -> None:
        """Take over the sequence's tokens; accepted draft tokens keep their K/V."""
        common, draft_tokens = self.num_settled, self.tokens
        limit = min(len(draft_tokens), len(tokens))
        while common < limit and draft_tokens[common] == tokens[common]:
            common += 1
        del draft_tokens[common:]
        draft_tokens += tokens[common:]
        self.num_settled = len(tokens)
        self.computed = min(self.computed, common, len(tokens) - 1)

    @property
    def lag(self) -> int:
        """Number of tokens without K/V."""
        return len(self.tokens) - self.computed


@dataclass(slots=True, eq=False)
class _PartialDraft:
    """A draft in the making; `probability` is that of all its tokens being accepted."""

    request: DraftRequest
    state: _SequenceState
    tokens: list[int] = field(default_factory=list)
    confidences: list[int] = field(default_factory=list)
    probability: float = 1.0

    def append(self, token: int, probability: float) -> bool:
        """Add a token; whether to go on. A token that is not worth a place in the step is still added, as the last."""
        level = bisect(EDGES, probability)
        self.probability *= self.request.acceptance_rates[level]
        self.tokens.append(token)
        self.confidences.append(level)
        self.state.tokens.append(token)
        return len(self.tokens) < self.request.max_tokens and self.probability >= self.request.min_acceptance


class ModelDrafter:
    """A model of `max_length` positions with `num_blocks` blocks of `block_size` tokens, at most `max_tokens` a step.

    When blocks run out, those of the sequences drafted for least recently are reused.
    """

    name = "draft_model"
    runs_model = True

    def __init__(
        self, model: DraftModel, *, max_length: int, num_blocks: int, block_size: int, max_tokens: int
    ) -> None:
        self._model = model
        self._max_length = max_length
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._free_blocks = list(range(num_blocks))
        self._states: OrderedDict[int, _SequenceState] = OrderedDict()  # least recently drafted for first
        self._num_drafting = 0  # how many of the last ones are being drafted for
        self._ended: deque[int] = deque()

    def unused_blocks(self) -> list[int]:
        """The blocks that no live sequence uses, in order. On the thread of `propose`."""
        self._release_ended()
        return sorted(self._free_blocks)

    def forget(self, seq_id: int) -> None:
        """Free the sequence's blocks before the next drafting. From any thread."""
        self._ended.append(seq_id)

    def propose(self, requests: SequenceOf[DraftRequest]) -> list[Draft]:
        """A draft for each request, in order; an empty one where the model still has to prefill."""
        self._release_ended()
        drafts = [_PartialDraft(request, self._state(request)) for request in requests]
        running = [draft for draft in drafts if self._is_worthwhile(draft)]
        for draft in running:
            self._states.move_to_end(draft.request.seq.id)
        self._num_drafting = len(running)
        while running:
            running = self._step(running)
        return [Draft(tuple(draft.tokens), tuple(draft.confidences)) for draft in drafts]

    def _state(self, request: DraftRequest) -> _SequenceState:
        seq = request.seq
        state = self._states.get(seq.id)
        if state is None:
            state = self._states[seq.id] = _SequenceState()
        state.update(seq.tokens)
        return state

    def _is_worthwhile(self, draft: _PartialDraft) -> bool:
        seq = draft.request.seq
        fits = seq.length + draft.request.max_tokens <= self._max_length
        return fits and draft.state.lag <= MAX_LAG * (seq.max_len - seq.length) + 1

    def _step(self, drafts: SequenceOf[_PartialDraft]) -> list[_PartialDraft]:
        """One step of the model; the drafts that go on."""
        rows, planned, tokens_left = [], [], self._max_tokens
        for draft in drafts:
            row = self._row(draft, tokens_left)
            if row is not None:
                rows.append(row)
                planned.append(draft)
                tokens_left -= row.end - row.start
        if not rows:
            return []
        predictions = self._model(StepPlan(tuple(rows)))
        running = []
        for draft, row, prediction in zip(planned, rows, predictions, strict=True):
            draft.state.computed = row.end
            if prediction is not None and draft.append(*prediction):
                running.append(draft)
        return running

    def _row(self, draft: _PartialDraft, max_tokens: int) -> Row | None:
        """The next tokens to compute, at most `max_tokens`; None where there are no tokens or blocks left."""
        state, seq = draft.state, draft.request.seq
        end = state.computed + min(state.lag, max_tokens)
        if end == state.computed or not self._reserve(state, end):
            return None
        samples = end == len(state.tokens)
        return Row(seq.id, state.tokens, state.computed, end, state.blocks, samples, _GREEDY, seq.prompt_len)

    def _reserve(self, state: _SequenceState, end: int) -> bool:
        """Make positions < `end` writable, taking blocks of sequences that are not drafted for now if necessary.

        False for lack of blocks.
        """
        num_missing = -(-end // self._block_size) - len(state.blocks)
        while num_missing > len(self._free_blocks) and len(self._states) > self._num_drafting:
            self._release(next(iter(self._states)))
        if num_missing > len(self._free_blocks):
            return False
        state.blocks.extend(self._free_blocks.pop() for _ in range(num_missing))
        return True

    def _release_ended(self) -> None:
        while self._ended:
            self._release(self._ended.popleft())

    def _release(self, seq_id: int) -> None:
        state = self._states.pop(seq_id, None)
        if state is not None:
            self._free_blocks.extend(state.blocks)

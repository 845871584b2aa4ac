"""The frozen messages of a step: `StepPlan` goes to the model, `StepResult` comes back.

A plan is valid until its step is committed or failed. Its rows refer to the live, append-only `tokens` and `blocks` of
their sequences: the scheduler writes neither while a plan executes, so the executor may read them without a copy.

What is created for every row of every step is a named tuple, which takes a third of the time of a frozen dataclass.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.constraint import Constraint
from penstock.sampling import SamplingParams
from penstock.scores import ScorePart
from penstock.sequence import FinishReason

NO_POSITIONS = range(0)


class Row(NamedTuple):
    """One sequence's share of a step: positions [start, end) of its tokens go through the model.

    Positions from `len(tokens)` on, if any, are `draft` tokens. `samples` says whether the step reaches the newest
    token, so that a token is sampled after position end-1 (and after each draft). K/V of position p is in block
    `blocks[p // block_size]`, slot `p % block_size`. `scored` are the positions of the tokens whose log probabilities
    are wanted from this row, each from the logits one position before it: [start, end) holds those.
    `siblings` are rows without tokens of their own, whose first token is sampled from the same logits. The masks of a
    `constraint` are filled while the step runs. `adapter` is the key of a loaded adapter, "" without one.
    """

    seq_id: int
    tokens: SequenceOf[int]
    start: int
    end: int
    blocks: array[int]
    samples: bool
    params: SamplingParams
    prompt_len: int
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    sample_index: int = 0
    draft: tuple[int, ...] = ()
    siblings: tuple[Row, ...] = ()
    constraint: Constraint | None = None
    scored: range = NO_POSITIONS
    adapter: str = ""

    @property
    def num_tokens(self) -> int:
        """Number of tokens this row puts through the model."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step does, in this order: move blocks to the host and back, copy blocks, run the rows.

    `swaps_out` are (block, place on the host), `swaps_in` (place, block), `copies` (source, destination) blocks. A plan
    that is not `is_constrained` has no row with a constraint.
    """

    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int], ...] = ()
    swaps_out: tuple[tuple[int, int], ...] = ()
    swaps_in: tuple[tuple[int, int], ...] = ()
    is_constrained: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens the step puts through the model."""
        return sum(row.end - row.start for row in self.rows)


class TokenLogprobs(NamedTuple):
    """Log probabilities at one position.

    `logprob` is the model's own (no temperature, no filter), `sampled` the one under the distribution that was sampled
    from (0.0 when greedy). `rank` of the token is 1-based in the model's distribution, 0 if not requested; `top` holds
    (token, logprob, rank) of the most likely tokens, best first, if requested. In a beam search `sampled` is what the
    token adds to its beam's score: `logprob`, after the request's logits processors.
    """

    token: int
    logprob: float
    sampled: float
    rank: int = 0
    top: tuple[tuple[int, float, int], ...] = ()


class RowResult(NamedTuple):
    """What one row produced: accepted tokens in order (none while prefilling), or the error that ends its request.

    `prompt_logprobs[i]` belongs to the prompt token at position `scored[i]`, and `scores` to all of `scored`: which of
    the two a row has depends on its parameters. `candidates` are the best continuations of a beam, best first; a beam
    samples no token. `siblings` are the results of the row's siblings. `pooled` is the embedding of a prompt that this
    row completes, float32, as it was pooled.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: Exception | None = None
    candidates: tuple[TokenLogprobs, ...] = ()
    siblings: tuple[RowResult, ...] = ()
    pooled: array[float] | None = None
    scores: ScorePart | None = None

    @property
    def num_accepted(self) -> int:
        """How many of the tokens are accepted drafts: all but the last."""
        return max(0, len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One `RowResult` per row of the plan, in the plan's order; `weight_version` ran the step."""

    rows: tuple[RowResult, ...]
    weight_version: int = 0
    timings_s: dict[str, float] = field(default_factory=dict)


class StepRecord(NamedTuple):
    """The measurements of one step, for metrics, advisor and tuner.

    `seconds` is the time since the previous step, if both ran back to back: the time between two tokens of a stream. Of
    `rows`, `streams` had only their newest token and its drafts to compute. `tokens` went through the model;
    `prompt_tokens` of them belong to the other rows, at a mean position of `depth`. `generated` tokens came out, and
    `waiting` sequences were left in the queue. Of `tokens`, `drafted` were drafts, of which `accepted` are among
    `generated`. `timings_s` are the runner's own measurements.
    """

    seconds: float
    rows: int
    streams: int
    tokens: int
    prompt_tokens: int
    depth: float
    generated: int
    waiting: int
    drafted: int = 0
    accepted: int = 0
    timings_s: Mapping[str, float] = {}


class Event(NamedTuple):
    """What one step changed for one sequence. `reason` is set on exactly one event, the last one.

    `error` comes with FinishReason.ERROR, and with DEADLINE if there are details. Of the step's `num_drafted_tokens`
    draft tokens, `num_accepted_tokens` were accepted and are among `tokens`. `weight_version` made the tokens; those of
    a beam come from several steps, whose versions are `weight_versions`.
    """

    seq_id: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    reason: FinishReason | None = None
    stop_token: int | None = None
    error: Exception | None = None
    num_cached_tokens: int = 0
    weight_version: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    pooled: array[float] | None = None
    weight_versions: tuple[int, ...] = ()
    scores: ScorePart | None = None


def record_of(plan: StepPlan, result: StepResult, events: Iterable[Event], seconds: float, waiting: int) -> StepRecord:
    """The record of a step whose commit returned these events."""
    drafted = accepted = 0
    # Tokens after a stop, or of a sequence that ended meanwhile, are in no event.
    counts: dict[int, int] = {}
    for event in events:
        counts[event.seq_id] = len(event.tokens)
        drafted += event.num_drafted_tokens
        accepted += event.num_accepted_tokens
    streams = tokens = prompt_tokens = position_sum = generated = 0
    for row, out in zip(plan.rows, result.rows, strict=True):
        generated += 1 if out.candidates else counts.get(row.seq_id, 0)  # a beam advances by one token
        for sibling in row.siblings:
            generated += counts.get(sibling.seq_id, 0)
        count = row.end - row.start
        tokens += count
        if row.samples and count == 1 + len(row.draft):
            streams += 1
        else:
            prompt_tokens += count
            position_sum += count * (row.start + row.end)
    depth = position_sum / (2 * prompt_tokens) if prompt_tokens else 0.0
    progress = streams, tokens, prompt_tokens, depth, generated, waiting
    return StepRecord(seconds, len(plan.rows), *progress, drafted, accepted, result.timings_s)

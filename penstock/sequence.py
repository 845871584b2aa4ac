"""`Sequence`: the one mutable record of the core, and the functions that may write each field.

A sequence is (tokens, computed); everything else is a subtraction. There are no phases: prefill, chunked prefill,
decode, a cache hit, a rejected draft and a resumed victim are all "make `computed` catch up with `tokens`".
Written on the engine's thread only, by the scheduler and the cache manager; `tests/architecture/test_writers.py`
enforces the writers that are named next to the fields.
"""

from __future__ import annotations

import math
import sys
from array import array
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from penstock.constraint import Constraint
from penstock.pooling import PoolingParams
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scoring import ScoringParams


class Status(Enum):
    """State of a sequence. Legal moves: WAITING <-> RUNNING, and either -> FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a sequence ended. Each equals its string: `FinishReason.STOP == "stop"`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One stream of tokens: the prompt and the output generated after it.

    Times are seconds on the engine's clock. `max_len` is the maximum length, prompt included. `stop_ids` holds every id
    that ends the sequence (EOS unless ignored, stop ids). `seed`, `sample_index` and the position key its random
    numbers. `namespace` isolates prefix-cache sharing. `adapter` is the key of its adapter, "" without one.
    `parent` is the sequence whose prompt blocks this one may share: the first of its request (n > 1), the one it was
    forked from, or None. `constraint` follows the accepted output.
    """

    # Fixed at construction, except `tokens`.
    id: int
    request_id: str
    params: SamplingParams
    tokens: list[int]  # prompt + accepted output: Scheduler.commit; of beams, Searches.advance
    max_len: int
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    sample_index: int = 0
    priority: RequestPriority = RequestPriority.NORMAL
    arrival: float = 0.0
    deadline: float = math.inf
    ttft_deadline: float = math.inf
    namespace: str = ""
    adapter: str = ""
    parent: Sequence | None = field(default=None, repr=False)
    constraint: Constraint | None = field(default=None, repr=False)  # advanced by Scheduler.commit
    prompt_len: int = field(init=False)
    scored: range = field(init=False)  # positions of the tokens whose log probabilities are wanted, at the prompt's end
    max_cached: int = field(init=False)  # how many of its first tokens may be a cached prefix

    # Progress. The same table, with the reasons, is in docs/design.md.
    draft: tuple[int, ...] = ()  # unverified tokens: Scheduler.offer; cleared by commit, plan, preempt and finish
    computed: int = 0  # tokens whose K/V is settled: commit; of beams, Searches; plan (prefix hit); preempt (0)
    in_flight: int = 0  # tokens in the executing step: plan (+), commit, fail and restart (0)
    blocks: array[int] = field(default_factory=lambda: array("i"))  # block table: CacheManager
    status: Status = Status.WAITING  # LiveSequences._move
    reason: FinishReason | None = None  # LiveSequences._move

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)
        params, begin = self.params, self.prompt_len
        if isinstance(params, ScoringParams):
            begin -= params.num_scored
        elif params.prompt_logprobs is not None:
            begin = 1  # nothing precedes the first token
        self.scored = range(begin, self.prompt_len)
        pools_all = isinstance(params, PoolingParams) and params.pooling == "mean"
        # A score needs the logits of the token before it.
        self.max_cached = 0 if pools_all else begin - 1 if self.scored else sys.maxsize

    @property
    def length(self) -> int:
        """Number of accepted tokens, prompt included."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Number of accepted output tokens."""
        return len(self.tokens) - self.prompt_len

    @property
    def width(self) -> int:
        """Number of sequences of its request that must run in the same steps: the beams of its search, or 1."""
        return self.params.num_beams or 1

    @property
    def todo(self) -> int:
        """Number of tokens that still have to go through the model before the next sample."""
        return len(self.tokens) + len(self.draft) - self.computed - self.in_flight

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token, and drafts after it, are left to compute before the next sample."""
        return self.computed + 1 >= len(self.tokens)

    @property
    def takes_draft(self) -> bool:
        """Whether a draft may follow its newest token in the next step.

        Never before its first sample, whose logits sibling sequences may share, and never for a beam, whose row yields
        candidates instead of a token.
        """
        is_idle = self.status is Status.RUNNING and not self.in_flight
        newest = len(self.tokens) - 1
        return is_idle and self.computed == newest >= self.prompt_len and not self.params.use_beam_search

    @property
    def is_scoring(self) -> bool:
        """Whether some of the tokens that are left to compute have a scored token after them."""
        return bool(self.scored) and self.computed + 1 < self.scored.stop

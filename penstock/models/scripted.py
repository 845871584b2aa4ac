"""`ScriptedModel`: a model that emits a given script of tokens, and is slow or fails on request.

For tests of programs that embed the engine, and for our own: no weights, no torch, no randomness. Pass it in place of a
model: `InferenceEngine(ScriptedModel([5, 6, 7]))`.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import repeat

from penstock.api.weights import SleepLevel, WeightSource
from penstock.constraints.masks import Masks
from penstock.errors import ConfigurationError, shown
from penstock.models.protocol import ModelSpec
from penstock.pooling import PoolingParams
from penstock.scores import FloatArray, Score, ScorePart
from penstock.scoring import ScoringParams
from penstock.step import Row, RowResult, StepPlan, StepResult, TokenLogprobs

# A fixed list of output tokens, repeated as needed, or (all tokens so far, sample index) -> next token.
Script = Sequence[int] | Callable[[Sequence[int], int], int]


class ScriptedModel:
    """Runs plans by reading a script.

    Every token, of prompts too, has the log probability 0. Every step sleeps for `step_s` plus `token_s` per token, in
    seconds. An embedding has `hidden_size` numbers; number j of token t is cos((t + 1) (j + 1)). `fail_next(error)`
    makes the next step or update raise. `plans` counts steps, `weight_version` updates, whose sources are in `updates`.
    `vocab_size`, `max_length` and `eos_token_ids` are those of the spec.
    """

    def __init__(
        self,
        script: Script,
        *,
        vocab_size: int = 32000,
        max_length: int = 1 << 20,
        eos_token_ids: frozenset[int] = frozenset(),
        step_s: float = 0.0,
        token_s: float = 0.0,
        hidden_size: int = 8,
    ) -> None:
        self.spec = ModelSpec(
            name="scripted",
            vocab_size=vocab_size,
            max_length=max_length,
            eos_token_ids=eos_token_ids,
            hidden_size=hidden_size,
        )
        if not callable(script) and not all(hasattr(token, "__index__") for token in script):
            raise ConfigurationError(f"a script is a list of token ids or a function, got {shown(script)}")
        self.step_s = step_s
        self.token_s = token_s
        self.plans = 0
        self.weight_version = 0
        self.updates: list[WeightSource] = []
        self._script = script
        self._errors: deque[Exception] = deque()
        self._running = threading.Event()
        self._running.set()

    def fail_next(self, error: Exception) -> None:
        """Make the next step, or the next update, raise `error`."""
        self._errors.append(error)

    def hold(self) -> None:
        """Make steps and updates wait until `release()`."""
        self._running.clear()

    def release(self) -> None:
        """Let waiting steps continue."""
        self._running.set()

    def free_bytes(self) -> int:
        """More than any test needs at a byte per token."""
        return 1 << 40

    def host_free_bytes(self) -> int:
        """As much as device memory."""
        return self.free_bytes()

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        """A script needs no cache."""

    def execute(self, plan: StepPlan, masks: Masks | None = None) -> StepResult:
        """Emit the next scripted token of every row that samples, and one more for each of its correct drafts.

        Where a constraint does not allow the token, the row emits the first token that it does allow.
        """
        self.plans += 1
        delay = self.step_s + self.token_s * plan.num_tokens
        if delay:
            time.sleep(delay)
        self._running.wait()
        if self._errors:
            raise self._errors.popleft()
        if masks is not None:
            masks.wait()
        return StepResult(tuple(self._result(row, masks) for row in plan.rows), self.weight_version)

    def read_weights(self, source: WeightSource) -> WeightSource:
        """Any source will do."""
        return source

    def update_weights(self, source: WeightSource) -> None:
        """Remember the source."""
        self._running.wait()
        if self._errors:
            raise self._errors.popleft()
        self.updates.append(source)
        self.weight_version += 1

    def check_unload(self, level: SleepLevel) -> None:
        """There is nothing to lose."""

    def unload(self, level: SleepLevel) -> None:
        """There is nothing to free."""

    def reload(self) -> None:
        """There is nothing to make again."""

    def forget(self, seq_id: int) -> None:
        """There is no state."""

    def memory_usage(self) -> float:
        """A script uses no memory."""
        return 0.0

    def trim_memory(self, blocks: Sequence[int] = (), places: Sequence[int] = ()) -> int:
        """There is nothing to give back."""
        return 0

    def close(self) -> None:
        """Let waiting steps continue."""
        self.release()

    def _result(self, row: Row, masks: Masks | None) -> RowResult:
        if isinstance(row.params, PoolingParams):
            return self._pooled(row, row.params.pooling)
        if not row.scored:
            return self._sample(row, masks)
        if isinstance(row.params, ScoringParams):
            return self._scored(row, row.params)
        prompt = row.tokens[row.scored.start : row.scored.stop]
        return self._sample(row, masks)._replace(prompt_logprobs=tuple(map(_certain, prompt)))

    def _scored(self, row: Row, params: ScoringParams) -> RowResult:
        import numpy as np  # not imported with the package, because that takes long

        zeros, count = np.zeros, len(row.scored)
        tempered, entropies = (
            zeros(count, np.float32) if wanted else None for wanted in (params.tempers, params.wants_entropies)
        )
        logits: FloatArray = None
        if params.wants_logits:
            logits = np.full((count, self.spec.vocab_size), -np.float32(np.inf))
            logits[range(count), row.tokens[row.scored.start : row.scored.stop]] = 0.0
        begin = row.scored.start - (row.prompt_len - params.num_scored)
        return RowResult(scores=ScorePart(begin, Score(zeros(count, np.float32), tempered, logits, entropies)))

    def _pooled(self, row: Row, pooling: str) -> RowResult:
        if row.end < row.prompt_len:
            return RowResult()
        tokens = row.tokens if pooling == "mean" else row.tokens[-1:]
        sums = (sum(math.cos((token + 1) * (j + 1)) for token in tokens) for j in range(self.spec.hidden_size))
        return RowResult(pooled=array("f", (value / len(tokens) for value in sums)))

    def _sample(self, row: Row, masks: Masks | None) -> RowResult:
        if not row.samples:
            return RowResult()
        if masks is not None and row.constraint is not None and (error := masks.error(row)) is not None:
            return RowResult(error=error)
        tokens = [self._next(row, row.tokens, 0, masks)]
        for place, token in enumerate(row.draft, 1):
            if token != tokens[-1]:
                break
            tokens.append(self._next(row, [*row.tokens, *tokens], place, masks))
        entries = tuple(map(_certain, tokens))
        if row.params.use_beam_search:
            return RowResult(candidates=entries)  # a script has one continuation
        return RowResult(tuple(tokens), entries, siblings=tuple(map(self._result, row.siblings, repeat(masks))))

    def _next(self, row: Row, tokens: Sequence[int], place: int, masks: Masks | None) -> int:
        """The token after `place` draft tokens."""
        token = self.scripted_token(row, tokens)
        return token if masks is None or row.constraint is None else masks.nearest(row, place, token)

    def scripted_token(self, row: Row, tokens: Sequence[int]) -> int:
        """The token that follows these in the script of a row. Replaced by models with other scripts."""
        if callable(self._script):
            return self._script(tokens, row.sample_index)
        return self._script[(len(tokens) - row.prompt_len) % len(self._script)]


@lru_cache(maxsize=4096)
def _certain(token: int) -> TokenLogprobs:
    """The log probabilities of a token that was the only possible one."""
    return TokenLogprobs(token, 0.0, 0.0, 1, ((token, 0.0, 1),))

"""`Limits`: how much a step may take: the current settings, narrowed by the tuner. `StepLimits` is one reading of them.

Owns nothing but the tuner's latest limits (`tuned`, written by the engine's thread). Resolved once per step by
`Scheduler.plan`, and outside a step by the engine when it coalesces a burst or drafts.
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.config import EngineConfig
from penstock.optimizers.tuning.tuner import TunedLimits, ceilings, initial_limits


class StepLimits(NamedTuple):
    """The limits of one step.

    A step has at most `max_batch_size` rows and `step_tokens` tokens. No sequence starts while `max_running` or more
    run; the tuner lowers `max_running` and never `max_batch_size`, so a running sequence does not wait for it. A draft
    has at most `draft_length` tokens. An idle engine waits at most `batch_timeout_s` for a burst to be complete.
    `target` is the declared goal.
    """

    max_batch_size: int
    max_running: int
    step_tokens: int
    draft_length: int
    batch_timeout_s: float
    target: str | None = None
    tuned: TunedLimits | None = None

    def token_budget(self, stream_tokens: int, depth: int) -> int:
        """Maximum tokens of a step with `stream_tokens` decode and draft tokens and its first prompt at `depth`.

        The tuner never takes tokens away from streams, nor the minimum that a prompt must get.
        """
        if self.tuned is None:
            return self.step_tokens
        return min(self.step_tokens, self.tuned.step_tokens(stream_tokens, depth))


class Limits:
    """Reads `config` at every call, so an assignment takes effect at the next step, also while the engine is tuned."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._tuned: TunedLimits | None = None
        self._tuned_target: str | None = None

    @property
    def tuned(self) -> TunedLimits | None:
        """The tuner's latest limits for the current target, or its starting point. None without a target."""
        target = self._config.target
        if target == self._tuned_target:
            return self._tuned
        return None if target is None else initial_limits(self._config)

    @tuned.setter
    def tuned(self, tuned: TunedLimits | None) -> None:
        self._tuned, self._tuned_target = tuned, self._config.target

    def resolve(self) -> StepLimits:
        """The limits as they are now."""
        config, tuned = self._config, self.tuned
        timeout_ms = config.batch_timeout_ms
        if tuned is None:
            rows, tokens = config.max_batch_size, config.max_num_batched_tokens
            return StepLimits(rows, rows, tokens, config.speculation_length, timeout_ms / 1000, config.target)
        ceiling = ceilings(config)
        return StepLimits(
            max_batch_size=ceiling.max_batch_size,
            max_running=min(ceiling.max_batch_size, tuned.max_batch_size),
            step_tokens=ceiling.max_num_batched_tokens,
            draft_length=min(config.speculation_length, tuned.draft_length),
            batch_timeout_s=min(timeout_ms, tuned.batch_timeout_ms) / 1000,
            target=config.target,
            tuned=tuned,
        )

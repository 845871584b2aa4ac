"""`Limits`: how much a step may take now: the settings as they are at this moment, narrowed by what the tuner found.

Owns nothing but the tuner's latest word (`tuned`, written by the engine's thread). Never decides. Asked by `Scheduler`
when a step begins, by the engine when it coalesces a burst, and by whoever drafts.
"""

from __future__ import annotations

from penstock.config import EngineConfig
from penstock.optimizers.tuner import Tuned, ceilings, first


class Limits:
    """Read from `config` at every call, so an assignment takes effect at the next step, also while it is tuned."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._tuned: Tuned | None = None
        self._tuned_for: str | None = None

    @property
    def target(self) -> str | None:
        """The goal that is declared now."""
        return self._config.target

    @property
    def tuned(self) -> Tuned | None:
        """The tuner's latest word toward this goal; until there is one, where tuning begins. None without a goal."""
        if self.target == self._tuned_for:
            return self._tuned
        return None if self.target is None else first(self._config)

    @tuned.setter
    def tuned(self, tuned: Tuned | None) -> None:
        self._tuned, self._tuned_for = tuned, self.target

    @property
    def max_batch_size(self) -> int:
        """Most rows of a step. Not narrowed by the tuner: nobody who runs is made to wait."""
        return self._config.max_batch_size if self.tuned is None else ceilings(self._config).max_batch_size

    @property
    def max_running(self) -> int:
        """Most sequences that run; while there are more, none starts."""
        most = self.max_batch_size
        return most if self.tuned is None else min(most, self.tuned.max_batch_size)

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step."""
        config = self._config
        return config.max_num_batched_tokens if self.tuned is None else ceilings(config).max_num_batched_tokens

    def tuned_tokens(self, stream_tokens: int, depth: int) -> int:
        """Most tokens of a step whose streams, drafts included, have so many, when its first prompt is at `depth`.

        The tuner never takes away what streams have, nor the least that a prompt must get.
        """
        most = self.step_tokens
        return most if self.tuned is None else min(most, self.tuned.step_tokens(stream_tokens, depth))

    @property
    def draft_length(self) -> int:
        """Most tokens of a draft; 0 for none."""
        most = self._config.speculation_length
        return most if self.tuned is None else min(most, self.tuned.draft_length)

    @property
    def batch_timeout_s(self) -> float:
        """Longest an idle engine waits for a burst to be complete."""
        wait_ms = self._config.batch_timeout_ms
        return (wait_ms if self.tuned is None else min(wait_ms, self.tuned.batch_timeout_ms)) / 1000

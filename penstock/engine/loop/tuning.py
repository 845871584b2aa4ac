"""`Tuning`: passes step records to the tuner every few steps, and applies its result to the limits.

Owns the window of records and the list of changes. Never computes a limit and reads no clock. Called after every step,
on the engine's thread; any thread may read its statistics.
"""

from __future__ import annotations

from collections import deque

from penstock.api.log import Logger
from penstock.api.stats import TunerChange, TunerStats
from penstock.config import EngineConfig
from penstock.optimizers.tuning.tuner import TunedLimits, initial_limits, limits_of, tune
from penstock.optimizers.tuning.window import StepWindow
from penstock.scheduling.limits import Limits
from penstock.step import StepRecord

TUNE_EVERY = 8  # steps between two runs of the tuner
# While prompts keep arriving, one step in so many excludes them, to measure the time of the streams alone.
PROBE_EVERY = 12
MAX_CHANGES = 32


class Tuning:
    """Does nothing while `config.target` is None; it may change at any time, and `target` is the one in force."""

    def __init__(self, config: EngineConfig, limits: Limits, log: Logger) -> None:
        self._config = config
        self._limits = limits
        self._log = log
        self.target: str | None = None
        self._window = StepWindow()
        self._changes: deque[TunerChange] = deque(maxlen=MAX_CHANGES)
        self._begin()

    def observe(self, record: StepRecord) -> None:
        """Record one step."""
        if self._config.target != self.target:
            self._begin()
        tuned = self._limits.tuned
        if tuned is None:
            return
        window = self._window
        window.add(record)
        if window.num_steps % TUNE_EVERY == 0 or self._is_late(record):
            tuned = self._log_changes(tuned, tune(window.records(), tuned, self._config, window.scatter))
        self._limits.tuned = tuned._replace(probe=self._needs_probe())

    def stats(self) -> TunerStats:
        """The target, the limits in force, the reason for them, and the latest changes; empty without a target."""
        tuned = self._limits.tuned
        if tuned is None:
            return {}
        return {
            "target": self.target,
            "limits": limits_of(tuned),
            "reason": tuned.reason,
            "steps": self._window.num_steps,
            "changes": list(self._changes.copy()),
        }

    def _begin(self) -> None:
        """Start with a new target: records made under another one are dropped."""
        self.target = self._config.target
        self._window = StepWindow()
        self._limits.tuned = None if self.target is None else initial_limits(self._config)

    def _is_late(self, record: StepRecord) -> bool:
        """Whether a stream waited too long, so that the tuner must run now."""
        late = record.streams and record.seconds > self._config.max_inter_token_ms / 1000
        return bool(late) and self.target == "latency"

    def _needs_probe(self) -> bool:
        return self._window.steps_since_plain >= PROBE_EVERY

    def _log_changes(self, before: TunedLimits, after: TunedLimits) -> TunedLimits:
        """Log every limit that changed, and return `after`."""
        old_limits = limits_of(before)
        for name, value in limits_of(after).items():
            old = old_limits[name]
            if value != old:
                step, reason = self._window.num_steps, after.reason
                self._changes.append(TunerChange(step=step, setting=name, before=old, after=value, reason=reason))
                self._log.info("tuned", setting=name, before=old, after=value, reason=reason)
        return after

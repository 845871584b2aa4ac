"""`StepObserver`: passes the record of every step to all that use it.

Owns no statistics itself. Called by `EngineCore` after every step, on the engine's thread.
"""

from __future__ import annotations

import time

from penstock.api.log import Logger
from penstock.config import BatchingStrategy, EngineConfig
from penstock.engine.loop.tuning import Tuning
from penstock.engine.observe.metrics import Metrics
from penstock.scheduling.advisor import BatchingOptimizer
from penstock.scheduling.forecast import Forecast
from penstock.scheduling.packing import strategy_of
from penstock.scheduling.scheduler import Scheduler
from penstock.step import StepRecord


class StepObserver:
    """Updates metrics, tuner, wait forecast and advisor, and logs each step if `profile_performance` is set."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        metrics: Metrics,
        tuning: Tuning,
        advisor: BatchingOptimizer,
        log: Logger,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._metrics = metrics
        self._tuning = tuning
        self._advisor = advisor
        self._log = log
        self._strategy = strategy_of(config)
        self.forecast = Forecast(scheduler, time.monotonic, static=self._strategy is BatchingStrategy.NAIVE)

    def observe(self, record: StepRecord) -> None:
        """Record one step."""
        self._metrics.step(record)
        self._tuning.observe(record)
        self.forecast.record(record)
        if self._metrics.enabled:
            limits, num_shortages = self._scheduler.step_limits, self._scheduler.num_shortages
            self._advisor.record_step(record, self._strategy, limits, num_shortages)
        if self._config.profile_performance:
            figures = {"rows": record.rows, "tokens": record.tokens, "seconds": record.seconds}
            self._log.debug("step", **figures, **record.timings_s)

"""Latency and throughput statistics over a sliding window.

Written by the engine's thread at every step; read from any thread. Times are seconds.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from penstock.api.log import Logger
from penstock.api.statistics import WINDOW, rate_statistics, statistics
from penstock.config import BatchingStrategy, EngineConfig
from penstock.engine.loop.tuning import Tuning
from penstock.engine.requests.logprob_check import FinishedRequests
from penstock.errors import EngineOverloaded, RequestError
from penstock.scheduling.advisor import BatchingOptimizer
from penstock.scheduling.forecast import Forecast
from penstock.scheduling.packing import strategy_of
from penstock.scheduling.scheduler import Scheduler
from penstock.step import StepRecord

_LATENCIES = ("queue_time", "first_token_latency", "inter_token_latency", "end_to_end_latency")


class Series:
    """The last `WINDOW` values of one metric, and the number of values ever recorded."""

    __slots__ = ("_values", "count")

    def __init__(self, maxlen: int = WINDOW) -> None:
        self._values: deque[float] = deque(maxlen=maxlen)
        self.count = 0

    def record(self, *values: float) -> None:
        """Add values."""
        self._values.extend(values)
        self.count += len(values)

    def summary(self) -> dict[str, float]:
        """The `statistics` of the recorded values."""
        return statistics(list(self._values), self.count)  # copied once, because the other thread keeps recording

    def merge(self, series: Series) -> None:
        """Add the values that another series has now."""
        self._values.extend(list(series._values))
        self.count += series.count


class Metrics:
    """The engine's measurements; `enabled=False` records none. `finished` keeps the latest outputs for a check."""

    def __init__(self, enabled: bool = True, kept_outputs: int = 0, window: int = WINDOW) -> None:
        self.enabled = enabled
        self.finished = FinishedRequests(kept_outputs)
        self._latencies: Mapping[str, Series] = {name: Series(window) for name in _LATENCIES}
        self._steps: deque[StepRecord] = deque(maxlen=window)
        self._prompt_steps: deque[StepRecord] = deque(maxlen=window)  # those in which prompt tokens were computed
        self._num_prompt_steps = 0
        self.refusals: Counter[str] = Counter()  # of requests that passed `Admission`, by the name of their error
        self.totals = {"requests": 0, "displaced_requests": 0, "prompt_tokens": 0, "generated_tokens": 0, "steps": 0}
        self.totals |= {"drafted_tokens": 0, "accepted_tokens": 0}

    def record(self, name: str, *values: float) -> None:
        """Record latencies."""
        if self.enabled:
            self._latencies[name].record(*values)

    def count(self, name: str, amount: int) -> None:
        """Add to a total."""
        if self.enabled:
            self.totals[name] += amount

    def end_request(self, error: Exception | None, *, was_accepted: bool) -> None:
        """Count a request as ended, as displaced from the queue, or as refused."""
        if isinstance(error, EngineOverloaded):
            self.count("displaced_requests", 1)
        elif was_accepted or not isinstance(error, RequestError):
            self.count("requests", 1)
        elif self.enabled:
            self.refusals[type(error).__name__] += 1

    def step(self, record: StepRecord) -> None:
        """Record one step."""
        if not self.enabled:
            return
        totals = self.totals
        totals["steps"] += 1
        totals["generated_tokens"] += record.generated
        totals["drafted_tokens"] += record.drafted
        totals["accepted_tokens"] += record.accepted
        self._steps.append(record)
        if record.prompt_tokens:
            self._prompt_steps.append(record)
            self._num_prompt_steps += 1

    @classmethod
    def merged(cls, parts: Sequence[Metrics]) -> Metrics:
        """The measurements of several engines in one."""
        merged = cls(window=WINDOW * len(parts))
        for part in parts:
            for name, series in part._latencies.items():
                merged._latencies[name].merge(series)
            merged._steps.extend(list(part._steps))
            merged._prompt_steps.extend(list(part._prompt_steps))
            merged._num_prompt_steps += part._num_prompt_steps
            merged.refusals.update(dict(part.refusals))  # copied at once, because the other thread adds names
            for name, amount in part.totals.items():
                merged.totals[name] += amount
        return merged

    def summaries(self) -> dict[str, dict[str, float]]:
        """Statistics of every metric that has values, by name."""
        steps, count = list(self._steps), self.totals["steps"]
        prompt_steps = list(self._prompt_steps)
        seconds = [step.seconds for step in steps]
        prompt_seconds = [step.seconds for step in prompt_steps]
        prompt_tokens = [step.prompt_tokens for step in prompt_steps]
        figures = {
            "batch_processing_time": statistics(seconds, count),
            "batch_size": statistics([step.rows for step in steps], count),
            "batch_tokens": statistics([step.tokens for step in steps], count),
            **{name: series.summary() for name, series in self._latencies.items()},
            "tokens_per_second": rate_statistics([step.generated for step in steps], seconds, count),
            "prompt_tokens_per_second": rate_statistics(prompt_tokens, prompt_seconds, self._num_prompt_steps),
        }
        return {name: summary for name, summary in figures.items() if summary}


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
        if self._config.target is not None or self._tuning.target is not None:
            self._tuning.observe(record)
        self.forecast.record(record)
        if self._metrics.enabled:
            limits, num_shortages = self._scheduler.step_limits, self._scheduler.num_shortages
            self._advisor.record_step(record, self._strategy, limits, num_shortages)
        if self._config.profile_performance:
            figures = {"rows": record.rows, "tokens": record.tokens, "seconds": record.seconds}
            self._log.info("step", **figures, **record.timings_s)

"""`AdaptiveInferenceController`: the engine's tuner, for programs that run batches themselves.

A thin facade of `optimizers.tuning`: it turns metrics into step records and limits into parameters. It never proposes a
temperature or a length, which are the caller's. An engine tunes itself with `EngineConfig(target=...)`.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TypedDict

from penstock.config import EngineConfig, with_settings
from penstock.optimizers.tuning.tuner import initial_limits, tune
from penstock.step import StepRecord
from penstock.values import real

NUM_RECORDS = 100


class AdaptedParameters(TypedDict):
    """Sequences per batch, and draft tokens per sequence and step."""

    batch_size: int
    speculation_length: int


class AdaptiveInferenceController:
    """Proposes the size of the next batches from the measurements of the last hundred.

    `config` has the target ("throughput" if None; "latency" keeps a batch below `max_inter_token_ms`), the size to
    start with and the limits: `max_batch_size` and `speculation_length` where they were given. Not thread-safe. Raises
    `ConfigurationError`.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = with_settings(config, {})
        if self.config.target is None:
            self.config = self.config.model_copy(update={"target": "throughput"})
        self._records: deque[StepRecord] = deque(maxlen=NUM_RECORDS)
        self._limits = initial_limits(self.config)
        self._memory_usage = 0.0

    @property
    def current_params(self) -> AdaptedParameters:
        """What `adapt_parameters` returned last, or the values to start with."""
        return {"batch_size": self._limits.max_batch_size, "speculation_length": self._limits.draft_length}

    def update_metrics(self, latency: float, memory_usage: float, throughput: float) -> None:
        """Record one batch of the current size that others waited for.

        `latency` is its time in seconds, `throughput` what it generated in tokens per second, `memory_usage` a fraction
        from 0 to 1. Raises `RequestError` for anything but numbers.
        """
        seconds = real("latency", latency, 0.0, math.inf, "seconds, a number >= 0")
        rate = real("throughput", throughput, 0.0, math.inf, "tokens per second, a number >= 0")
        self._memory_usage = real("memory_usage", memory_usage, 0.0, math.inf, "a fraction, a number >= 0")
        rows = self._limits.max_batch_size
        self._records.append(
            StepRecord(
                seconds=seconds,
                rows=rows,
                streams=rows,
                tokens=rows,
                prompt_tokens=0,
                depth=0.0,
                generated=round(seconds * rate),
                waiting=1,
            )
        )

    def adapt_parameters(self) -> AdaptedParameters:
        """The parameters of the next batches; the same ones until at least four batches were recorded.

        While more than the fraction `gc_threshold` of the memory is in use, the batch does not grow.
        """
        limits = tune(list(self._records), self._limits, self.config)
        if self._memory_usage > self.config.gc_threshold:
            limits = limits._replace(max_batch_size=min(limits.max_batch_size, self._limits.max_batch_size))
        self._limits = limits
        return self.current_params

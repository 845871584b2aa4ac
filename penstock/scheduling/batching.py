"""`DynamicBatcher`: the engine's packings for programs that run their batches themselves.

Owns the items that wait and, under CONTINUOUS, those that run. Never loses, repeats or starves an item; never runs a
model. Called by programs, from one thread at a time; `packing` decides what starts together, as it does for the engine.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from penstock.config import BatchingStrategy, explained
from penstock.errors import ConfigurationError, RequestError, RequestTooLarge, shown
from penstock.sampling import RequestPriority
from penstock.scheduling.bucketing import Item, Tensor, calculate_padding_efficiency, create_padded_batch
from penstock.scheduling.estimator import MemoryEstimator
from penstock.scheduling.packing import MIB, Bucketed, Continuous, MemoryAware, Naive, Packing
from penstock.scheduling.policy import AgingPolicy
from penstock.scheduling.queue import WaitingQueue

BOOST_S = 5.0  # seconds of waiting that count as one priority class, as in the engine


class BatchingConfig(BaseModel):
    """Settings of a `DynamicBatcher`. Invalid ones raise `ConfigurationError`.

    An assignment takes effect at the next batch; `strategy`, `bucket_size` and `enable_continuous_batching` are read
    when a batcher is made. For continuous batching use strategy CONTINUOUS with `DynamicBatcher.complete`, or a
    `ContinuousBatcher`.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    strategy: BatchingStrategy = BatchingStrategy.MEMORY_AWARE
    max_batch_size: int = Field(32, ge=1, description="Maximum items of a batch.")
    max_sequence_length: int = Field(2048, ge=1, description="Maximum tokens of an item.")
    bucket_size: int = Field(128, ge=0, description="Largest difference of lengths in a batch under BUCKETED.")
    memory_limit_mb: float = Field(
        4096, gt=0, description="Maximum MiB of a batch, and of the weights if the estimator has them."
    )
    max_total_tokens: int = Field(32768, ge=1, description="Maximum tokens of a batch, padding included.")
    enable_continuous_batching: bool = Field(
        True, description="False: a CONTINUOUS batch ends before the next one starts."
    )
    prefill_chunk_size: int | None = Field(
        None,
        ge=1,
        description="Maximum tokens of the items that join a CONTINUOUS batch at once, if more than one does.",
    )
    batch_timeout_ms: float = Field(
        0.0, ge=0, description="Time that an item waits for max_batch_size items where nothing runs; 0 never waits."
    )
    padding_token_id: int = Field(0, ge=0, description="The padding of `DynamicBatcher.create_padded_batch`.")

    def __init__(self, **values: object) -> None:
        with explained(BatchingConfig.model_fields):
            super().__init__(**values)

    def __setattr__(self, name: str, value: object) -> None:
        with explained(BatchingConfig.model_fields):
            super().__setattr__(name, value)


class BatchInfo(TypedDict, total=False):
    """The description of a batch; see `DynamicBatcher.get_next_batch`."""

    strategy: str
    batch_size: int
    max_length: int
    lengths: list[int]
    total_tokens: int
    efficiency: float
    estimated_memory_mb: float
    memory_utilization: float
    bucket_length: int
    continuing_requests: int
    new_requests: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """An item of a batcher, as a `Waiter` for the packings."""

    id: int
    request: object
    length: int
    max_len: int
    priority: int
    arrival: float
    deadline: float

    @property
    def request_id(self) -> str:
        """Every item is a request of its own."""
        return str(self.id)

    @property
    def width(self) -> int:
        """An item runs without others."""
        return 1


class DynamicBatcher:
    """Forms batches of (request, sequence length) pairs; the length is the final one, if the batch generates.

    NAIVE, BUCKETED and MEMORY_AWARE give static batches: each item comes once, and the previous batch is taken to be
    done. Under CONTINUOUS a batch is everything that runs, new items after those that go on; an item runs until
    `complete(request)` says that it ended. The order is that of the engine: by the `priority` of a request that has one
    (a number from 1 to 4), then by waiting time, then by its `deadline`, then by arrival. The first in the queue is
    part of every batch that has room, so nothing starves. MEMORY_AWARE and CONTINUOUS compare the estimate of
    `memory_estimator` with memory_limit_mb; without an estimator, max_total_tokens alone limits them.
    """

    _fixed_strategy: BatchingStrategy | None = None

    def __init__(
        self,
        config: BatchingConfig | None = None,
        memory_estimator: MemoryEstimator | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(config, BatchingConfig | None):
            raise ConfigurationError(f"config must be a BatchingConfig, got {shown(config)}")
        self.config = config or BatchingConfig()
        self.memory_estimator = memory_estimator
        self._clock = clock
        self._ids = itertools.count()
        self._waiting: WaitingQueue[Ticket] = WaitingQueue(AgingPolicy(BOOST_S))
        self._running: list[Ticket] = []
        self._strategy = self._fixed_strategy or self.config.strategy
        self._is_continuous = self._strategy is BatchingStrategy.CONTINUOUS
        self._packing = self._packing_of(self.config)

    def add_items(self, items: Iterable[tuple[object, int]]) -> None:
        """Queue (request, sequence length) pairs.

        Raises `RequestTooLarge`, and adds none, if one of them could not even run alone.
        """
        now = self._clock()
        tickets = [self._ticket(request, length, now) for request, length in items]
        for ticket in tickets:
            self._check(ticket)
        for ticket in tickets:
            self._waiting.push(ticket, now)

    def get_next_batch(self) -> tuple[list[Any], BatchInfo]:
        """The requests of the next batch, and its description; ([], {}) when there is nothing to run yet.

        The description has strategy, batch_size, max_length, lengths, total_tokens, efficiency (see
        `calculate_padding_efficiency`), with an estimator estimated_memory_mb and memory_utilization (of the limit),
        under BUCKETED bucket_length, under CONTINUOUS continuing_requests and new_requests.
        """
        now = self._clock()
        self._waiting.advance(now)
        if self._waits_for_more(now):
            return [], {}
        continuing = list(self._running) if self._is_continuous else []
        batch = list(continuing)
        for ticket in self._packing.select(self._waiting, batch, lambda ticket: self._has_room(ticket, batch)):
            self._waiting.remove(ticket.id)
            batch.append(ticket)
        if self._is_continuous:
            self._running = list(batch)
        return [ticket.request for ticket in batch], self._info(batch, len(continuing))

    def complete(self, *requests: object) -> None:
        """These requests of a CONTINUOUS batch have ended; the next batch may use their places.

        A request is recognized by identity. Raises `RequestError` for one that does not run.
        """
        for request in requests:
            ticket = next((ticket for ticket in self._running if ticket.request is request), None)
            if ticket is None:
                raise RequestError(f"{request!r} is not running: complete each request of a CONTINUOUS batch once")
            self._running.remove(ticket)

    def create_padded_batch(
        self, input_ids_list: Sequence[Tensor], attention_masks_list: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The function `create_padded_batch` with the configuration's padding_token_id.

        Raises `RequestTooLarge` for a sequence longer than max_sequence_length.
        """
        max_length = max((ids.shape[-1] for ids in input_ids_list), default=0)
        if max_length > self.config.max_sequence_length:
            raise RequestTooLarge(
                f"a sequence of {max_length} tokens exceeds max_sequence_length={self.config.max_sequence_length}: "
                "shorten it"
            )
        return create_padded_batch(input_ids_list, attention_masks_list, self.config.padding_token_id)

    @property
    def num_waiting(self) -> int:
        """Items that have not been in a batch."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Items of a CONTINUOUS batch that have not been completed."""
        return len(self._running)

    def _packing_of(self, config: BatchingConfig) -> Packing:
        if self._strategy is BatchingStrategy.BUCKETED:
            return Bucketed(config.bucket_size)
        if self._strategy is BatchingStrategy.MEMORY_AWARE:
            return MemoryAware(self._memory_mb, math.inf)  # its limit may change; `_has_room` checks it
        if self._is_continuous and config.enable_continuous_batching:
            return Continuous()
        return Naive(lambda: self.config.max_batch_size)

    def _ticket(self, request: object, length: int, now: float) -> Ticket:
        priority, deadline = getattr(request, "priority", None), getattr(request, "deadline", None)
        return Ticket(
            next(self._ids),
            request,
            length,
            length,
            int(priority) if isinstance(priority, int) else RequestPriority.NORMAL,
            now,
            float(deadline) if isinstance(deadline, int | float) else math.inf,
        )

    def _check(self, ticket: Ticket) -> None:
        """Raise for an item that fits no batch."""
        config, length = self.config, ticket.length
        max_length = min(config.max_sequence_length, config.max_total_tokens)
        if not 1 <= length <= max_length:
            raise RequestTooLarge(
                f"an item of {length} tokens fits no batch: lengths are from 1 to {max_length} "
                f"(max_sequence_length={config.max_sequence_length}, max_total_tokens={config.max_total_tokens})"
            )
        if not self._fits_memory([length]):
            raise RequestTooLarge(
                f"an item of {length} tokens needs {self._memory_mb([length]):,.0f} MiB alone and memory_limit_mb is "
                f"{config.memory_limit_mb:,.0f}: shorten it, or raise the limit"
            )

    def _waits_for_more(self, now: float) -> bool:
        """Whether nothing runs, and the items that wait are few and new."""
        if self._running or len(self._waiting) >= self.config.max_batch_size:
            return False
        return (
            now - min((ticket.arrival for ticket in self._waiting), default=now) < self.config.batch_timeout_ms / 1000
        )

    def _has_room(self, ticket: Ticket, batch: Sequence[Ticket]) -> bool:
        """Whether a batch has room for one more item; an empty one always has, even if limits were lowered."""
        if not batch:
            return True
        lengths = [*(member.length for member in batch), ticket.length]
        tokens = sum(lengths) if self._is_continuous else len(lengths) * max(lengths)
        return (
            len(lengths) <= self.config.max_batch_size
            and tokens <= self.config.max_total_tokens
            and self._packing.permits(ticket, batch)
            and self._fits_chunk(lengths)
            and self._fits_memory(lengths)
        )

    def _fits_chunk(self, lengths: Sequence[int]) -> bool:
        """Whether a CONTINUOUS batch may be joined by all items after those that go on."""
        limit, joining = self.config.prefill_chunk_size, lengths[len(self._running) :]
        return limit is None or not self._is_continuous or len(joining) == 1 or sum(joining) <= limit

    def _fits_memory(self, lengths: Sequence[int]) -> bool:
        is_limited = self._is_continuous or self._strategy is BatchingStrategy.MEMORY_AWARE
        return not is_limited or self._memory_mb(lengths) <= self.config.memory_limit_mb

    def _memory_mb(self, lengths: Sequence[int]) -> float:
        """MiB of a batch: static ones are padded, continuous ones are not."""
        estimator = self.memory_estimator
        if estimator is None:
            return 0.0
        count = len(lengths)
        mean = -(-sum(lengths) // count) if self._is_continuous else max(lengths)
        return estimator.estimate_total_memory(count, mean) / MIB

    def _info(self, batch: Sequence[Ticket], num_continuing: int) -> BatchInfo:
        if not batch:
            return {}
        lengths = [ticket.length for ticket in batch]
        padding = calculate_padding_efficiency(lengths)
        info: BatchInfo = {
            "strategy": self._strategy.value,
            "batch_size": len(batch),
            "max_length": max(lengths),
            "lengths": lengths,
            "total_tokens": sum(lengths),
            "efficiency": 1.0 if self._is_continuous else padding["efficiency"],
        }
        if self.memory_estimator is not None:
            memory_mb = self._memory_mb(lengths)
            info["estimated_memory_mb"] = memory_mb
            info["memory_utilization"] = memory_mb / self.config.memory_limit_mb
        if self._strategy is BatchingStrategy.BUCKETED:
            info["bucket_length"] = max(lengths)
        if self._is_continuous:
            info["continuing_requests"] = num_continuing
            info["new_requests"] = len(batch) - num_continuing
        return info


class ContinuousBatcher(DynamicBatcher):
    """A `DynamicBatcher` with strategy CONTINUOUS, whatever the configuration says, for programs with a step loop.

    A request runs until `complete(request)`, or until its attribute `is_complete` is true (a method is called).
    """

    _fixed_strategy = BatchingStrategy.CONTINUOUS

    def add_request(self, request: object, sequence_length: int) -> None:
        """Queue one request; see `add_items`."""
        self.add_items([(request, sequence_length)])

    def update_batch(self) -> tuple[list[Item], list[Item]]:
        """Drop what is complete and start what has room: the (request, sequence length) that go on, and the new ones.

        Together they are the next step's batch.
        """
        self.complete(*(ticket.request for ticket in self._running if _is_complete(ticket.request)))
        num_continuing = len(self._running)
        self.get_next_batch()
        items = [(ticket.request, ticket.length) for ticket in self._running]
        return items[:num_continuing], items[num_continuing:]


def _is_complete(request: object) -> bool:
    flag = getattr(request, "is_complete", False)
    return bool(flag() if callable(flag) else flag)

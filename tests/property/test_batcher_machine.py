"""Every strategy, under random traffic: no item is lost, none comes twice, none waits for ever."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock import BatchingConfig, BatchingStrategy, DynamicBatcher, MemoryEstimator

LONGEST = 40
ESTIMATOR = MemoryEstimator(16, 1, 2, vocab_size=10, max_step_tokens=8)
LEAST_MB = ESTIMATOR.estimate_batch_memory(1, LONGEST) / 2**20


class Item:
    """A request with a class."""

    def __init__(self, number: int, length: int, priority: int) -> None:
        self.number, self.length, self.priority = number, length, priority
        self.passed = 0  # batches that were formed while it waited


class Batcher(RuleBasedStateMachine):
    """Plays the program around a batcher."""

    @initialize(
        strategy=st.sampled_from(BatchingStrategy),
        size=st.integers(1, 5),
        bucket=st.integers(0, 10),
        tokens=st.integers(LONGEST, 3 * LONGEST),
        memory=st.floats(1.0, 4.0),
        is_known=st.booleans(),
        is_continuous=st.booleans(),
        chunk=st.none() | st.integers(1, LONGEST),
    )
    def start(
        self, strategy: BatchingStrategy, size: int, bucket: int, tokens: int, memory: float, **flags: Any
    ) -> None:
        self.config = BatchingConfig(
            strategy=strategy,
            max_batch_size=size,
            bucket_size=bucket,
            max_total_tokens=tokens,
            memory_limit_mb=LEAST_MB * memory,
            enable_continuous_batching=flags["is_continuous"],
            prefill_chunk_size=flags["chunk"],
        )
        self.now = 0.0
        self.batcher = DynamicBatcher(self.config, ESTIMATOR if flags["is_known"] else None, clock=lambda: self.now)
        self.waiting: list[Item] = []
        self.running: list[Item] = []
        self.count = 0

    @rule(lengths=st.lists(st.integers(1, LONGEST), max_size=6), priority=st.integers(1, 4))
    def add(self, lengths: list[int], priority: int) -> None:
        items = [Item(self.count + i, length, priority) for i, length in enumerate(lengths)]
        self.count += len(items)
        self.batcher.add_items([(item, item.length) for item in items])
        self.waiting += items

    @rule(seconds=st.floats(0.0, 6.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def form(self) -> None:
        batch, info = self.batcher.get_next_batch()
        assert batch[: len(self.running)] == self.running, "who runs goes on, in order"
        new = batch[len(self.running) :]
        assert len(set(map(id, new))) == len(new)
        assert all(item in self.waiting for item in new), "it comes once"
        assert bool(batch) == bool(self.waiting or self.running), "there is always a batch while anybody is here"
        self.check(batch, info)
        if len(new) > 1 and self.config.strategy is BatchingStrategy.CONTINUOUS:
            assert sum(item.length for item in new) <= (self.config.prefill_chunk_size or 1000)
        self.waiting = [item for item in self.waiting if item not in new]
        for item in self.waiting:
            item.passed += bool(new)
        self.running = batch if self.config.strategy is BatchingStrategy.CONTINUOUS else []

    def check(self, batch: list[Item], info: dict[str, Any]) -> None:
        lengths = [item.length for item in batch]
        assert info == {} if not batch else info["lengths"] == lengths
        if len(batch) < 2:
            return
        assert len(batch) <= self.config.max_batch_size
        static = self.config.strategy is not BatchingStrategy.CONTINUOUS
        assert (len(batch) * max(lengths) if static else sum(lengths)) <= self.config.max_total_tokens
        if self.config.strategy is BatchingStrategy.BUCKETED:
            assert max(lengths) - min(lengths) <= self.config.bucket_size
        if self.config.strategy in ("memory_aware", "continuous") and self.batcher.memory_estimator:
            assert info["memory_utilization"] <= 1

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 20))
    def complete(self, which: int) -> None:
        self.batcher.complete(self.running.pop(which % len(self.running)))

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "batcher"):
            assert (self.batcher.num_waiting, self.batcher.num_running) == (len(self.waiting), len(self.running))

    def teardown(self) -> None:
        """However it stands, and with newcomers of the same class at every batch: everybody has a turn."""
        if not hasattr(self, "batcher"):
            return
        old = list(self.waiting)
        for _ in range(3 * len(old) + 20):
            if not any(item in self.waiting for item in old):
                break
            self.add([1, 1], 4)
            self.now += 5.0
            self.running and self.complete(0)
            self.form()
        assert not any(item in self.waiting for item in old), "somebody starved"


TestBatcher = Batcher.TestCase
TestBatcher.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)

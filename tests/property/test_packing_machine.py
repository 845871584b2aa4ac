"""The scheduler's machine under every strategy and any tuning: crowds share, preempt, fail, expire, and all end."""

from __future__ import annotations

import random

import pytest

from penstock.config import BatchingStrategy
from penstock.optimizers.tuning.tuner import initial_limits
from penstock.scheduling.limits import Limits
from penstock.scheduling.packing import MIB, engine_packing
from penstock.scheduling.scheduler import Scheduler
from tests.property.test_scheduler_machine import Model, burst


@pytest.mark.parametrize("strategy", [strategy for strategy in BatchingStrategy if strategy != "continuous"])
@pytest.mark.parametrize("seed", range(10))
def test_crowds_end_under_every_strategy(strategy: BatchingStrategy, seed: int) -> None:
    rng, model = random.Random(f"{strategy} {seed}"), Model()
    block_size = rng.randint(2, 6)
    model.start(
        num_blocks=rng.randint(24, 40),
        block_size=block_size,
        batch=rng.randint(1, 8),
        budget=rng.randint(4, 60),
        caching=rng.random() < 0.8,
        max_cached=None,
        logit_rows=None,
        places=rng.choice([0, 10]),
    )
    model.config.batching_strategy = strategy
    model.config.block_size = block_size
    model.config.bucket_size = rng.choice([0, 3, 10])
    limits = Limits(model.config)
    packing = engine_packing(model.config, limits, model.cache.capacity, MIB, 0)
    model.scheduler = Scheduler(model.config, model.cache, limits=limits, packing=packing)
    for _ in range(8):
        burst(model, rng)
        model.run_steps(rng, rng.randint(1, 12))
        if rng.random() < 0.3:
            model.make_plan()
            if model.plan is not None:
                model.fail()
        model.time_passes(rng.random())
    model.teardown()


@pytest.mark.parametrize("seed", range(10))
def test_crowds_end_whatever_the_tuner_says(seed: int) -> None:
    """Probes, tiny chunks, batches below what runs: every step still makes progress, and no stream misses one."""
    rng, model = random.Random(seed), Model()
    model.start(
        num_blocks=rng.randint(24, 40),
        block_size=rng.randint(2, 6),
        batch=rng.randint(1, 8),
        budget=rng.randint(8, 60),
        caching=rng.random() < 0.8,
        max_cached=None,
        logit_rows=None,
        places=rng.choice([0, 10]),
    )
    model.config.target = "latency"
    for _ in range(20):
        model.scheduler.limits.tuned = initial_limits(model.config)._replace(
            chunk_tokens=rng.randint(1, 30),
            alone_tokens=rng.randint(1, 60),
            max_batch_size=rng.randint(1, 8),
            spare_s=rng.uniform(-0.1, 0.1),
            token_s=rng.choice([0.0, 0.001]),
            depth_s=rng.choice([0.0, 0.001]),
            probe=rng.random() < 0.3,
        )
        burst(model, rng)
        model.run_steps(rng, rng.randint(1, 4))
    model.teardown()

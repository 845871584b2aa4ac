"""What a step may take: the settings of this moment, and what the tuner found."""

from __future__ import annotations

from penstock.config import EngineConfig
from penstock.optimizers.tuning.tuner import FIRST_CHUNK, FIRST_ROWS, initial_limits
from penstock.scheduling.limits import Limits, StepLimits
from tests.unit.scheduling.world import World


def test_without_a_tuner_limits_are_the_settings() -> None:
    config = EngineConfig(max_batch_size=5, max_num_batched_tokens=70, speculation_length=3, batch_timeout_ms=20)
    limits = Limits(config)
    assert limits.resolve() == StepLimits(5, 5, 70, 3, 0.02)
    assert (limits.resolve().token_budget(4, 0), limits.resolve().token_budget(0, 900)) == (70, 70)
    config.max_batch_size = 9
    config.max_num_batched_tokens = 30
    assert (limits.resolve().max_running, limits.resolve().token_budget(4, 0)) == (9, 30)


def test_limits_that_were_resolved_stay_as_they_are() -> None:
    config = EngineConfig(max_batch_size=5)
    resolved = Limits(config).resolve()
    config.max_batch_size = 9
    assert resolved.max_running == 5


def test_the_tuner_narrows_starts_and_prompts_but_nothing_that_runs() -> None:
    config = EngineConfig(target="latency")
    limits = Limits(config)
    limits.tuned = initial_limits(config)._replace(
        chunk_tokens=20, max_batch_size=3, draft_length=1, batch_timeout_ms=2
    )
    resolved = limits.resolve()
    assert (resolved.max_batch_size, resolved.max_running, resolved.draft_length) == (32, 3, 1)
    assert (resolved.token_budget(10, 0), resolved.token_budget(0, 0), resolved.batch_timeout_s) == (30, 512, 0.002)


def test_a_setting_that_is_assigned_counts_at_once_also_while_tuned() -> None:
    config = EngineConfig(target="throughput")
    limits = Limits(config)
    limits.tuned = initial_limits(config)._replace(chunk_tokens=2048, alone_tokens=2048, max_batch_size=128)
    assert (limits.resolve().max_running, limits.resolve().token_budget(8, 0)) == (128, 2048)
    config.max_batch_size = 6
    config.max_num_batched_tokens = 64
    config.batch_timeout_ms = 1
    config.speculation_length = 2
    resolved = limits.resolve()
    assert (resolved.max_batch_size, resolved.max_running, resolved.token_budget(8, 0)) == (6, 6, 64)
    assert (resolved.batch_timeout_s, resolved.draft_length) == (0.001, 2)


def test_a_step_toward_throughput_has_so_many_tokens_in_all() -> None:
    """With the streams on top, no full step was of the size that was to be judged."""
    tuned = initial_limits(EngineConfig(target="throughput"))._replace(chunk_tokens=512, alone_tokens=512)
    assert [tuned.step_tokens(streams, 0) for streams in (0, 1, 32, 510, 600)] == [512, 512, 512, 514, 604]


def test_a_target_is_in_force_before_the_tuner_has_seen_a_step() -> None:
    config = EngineConfig()
    limits = Limits(config)
    config.target = "latency"
    assert (limits.resolve().max_running, limits.resolve().token_budget(4, 0)) == (FIRST_ROWS, 4 + FIRST_CHUNK)
    limits.tuned = initial_limits(config)._replace(max_batch_size=9)
    assert limits.resolve().max_running == 9
    config.target = "throughput"
    assert (limits.resolve().max_running, limits.resolve().token_budget(4, 0)) == (32, 512)
    config.target = None
    assert (limits.tuned, limits.resolve().max_running) == (None, 32)


def test_a_lower_tuned_batch_lets_those_that_run_go_on() -> None:
    world = World(target="latency")
    world.scheduler.limits.tuned = initial_limits(world.config)._replace(max_batch_size=3)
    for number in (1, 2, 3, 4):
        world.add(number, 3, new=4)
    assert list(world.step()) == [1, 2, 3]
    world.scheduler.limits.tuned = initial_limits(world.config)._replace(max_batch_size=1)
    assert list(world.step()) == [1, 2, 3]
    assert world.drain()[-1] == [4]


def test_chunks_follow_the_depth_of_the_prompt() -> None:
    world = World(num_blocks=100, target="latency")
    tuned = initial_limits(world.config)._replace(chunk_tokens=20, spare_s=0.010, token_s=0.0005, depth_s=0.0005 / 100)
    world.scheduler.limits.tuned = tuned
    world.add(1, 4, new=90)
    world.step()
    world.add(2, 300, new=1)
    assert world.step() == {1: (4, 5), 2: (0, 20)}
    assert world.step() == {1: (5, 6), 2: (20, 36)}, "10 ms at 0.6 a token are 16 tokens"
    assert world.step() == {1: (6, 7), 2: (36, 50)}


def test_drafts_take_nothing_from_prompts() -> None:
    world = World(num_blocks=100, target="latency")
    world.scheduler.limits.tuned = initial_limits(world.config)._replace(chunk_tokens=20)
    world.add(1, 4, new=90)
    world.step()
    world.add(2, 300, new=1)
    world.scheduler.offer(1, [5, 6, 7])
    assert world.step() == {1: (4, 8), 2: (0, 20)}

"""Levels and flags: what each turns on, and why some turn on nothing."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError
from penstock.optimizers.levels import (
    MEANINGLESS,
    PRESETS,
    OptimizationConfig,
    OptimizationLevel,
    warn_of_no_effect,
)
from penstock.sampling import SamplingParams


def test_the_defaults_are_those_of_the_table() -> None:
    config = OptimizationConfig()
    assert config.level is OptimizationLevel.BASIC
    assert (config.enable_speculative_decoding, config.speculation_length) == (True, 4)
    assert (config.enable_parallel_sampling, config.num_parallel_samples) == (True, 4)
    assert (config.enable_memory_pooling, config.compile_model) == (True, True)


@pytest.mark.parametrize("level", OptimizationLevel)
def test_every_level_is_a_set_of_settings_that_the_engine_has(level: OptimizationLevel) -> None:
    settings = OptimizationConfig(level=level).engine_settings()
    config = EngineConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings
    assert PRESETS[level].purpose


def test_no_two_levels_are_the_same() -> None:
    presets = [OptimizationConfig(level=level).engine_settings() for level in OptimizationLevel]
    assert all(presets.count(preset) == 1 for preset in presets)


def test_basic_changes_no_setting_but_the_flags() -> None:
    plain = EngineConfig().model_dump()
    changed = {name for name, value in OptimizationConfig().engine_settings().items() if value != plain[name]}
    assert changed <= {"enable_speculative_decoding", "speculation_length", "weight_mode"}


def test_a_flag_that_was_given_goes_before_the_level() -> None:
    memory = OptimizationLevel.MEMORY_OPTIMIZED
    assert OptimizationConfig(level=memory).compile_model is False
    assert OptimizationConfig(level="memory_optimized", compile_model=True).compile_model is True
    assert OptimizationConfig(level=memory, pool_size_mb=2).engine_settings()["logits_chunk_bytes"] == 2 * 2**20


@pytest.mark.parametrize("first", OptimizationLevel)
@pytest.mark.parametrize("then", OptimizationLevel)
def test_a_level_that_is_assigned_is_the_whole_level(first: OptimizationLevel, then: OptimizationLevel) -> None:
    """Its flags were those of the first level, beside the settings of the second."""
    config = OptimizationConfig(level=first, num_parallel_samples=2)
    config.pool_size_mb = 2
    config.level = then
    assert config == OptimizationConfig(level=then, num_parallel_samples=2, pool_size_mb=2)


def test_a_flag_that_was_given_stays_whatever_level_is_assigned() -> None:
    config = OptimizationConfig(speculation_length=6)
    config.enable_parallel_sampling = True
    config.level = OptimizationLevel.LATENCY_OPTIMIZED
    assert (config.speculation_length, config.enable_parallel_sampling) == (6, True)
    assert config.enable_adaptive_batching is True
    config.enable_adaptive_batching = False
    config.level = OptimizationLevel.BASIC
    config.level = OptimizationLevel.AGGRESSIVE
    assert config.enable_adaptive_batching is False


def flags_that_act() -> dict[str, Any]:
    """Flag -> a value that is not the default one."""
    return {
        "level": "aggressive",
        "enable_speculative_decoding": False,
        "speculation_length": 7,
        "draft_model": "somewhere",
        "enable_parallel_sampling": False,
        "num_parallel_samples": 2,
        "sample_aggregation": "cumulative_logprob",
        "enable_memory_pooling": False,
        "pool_size_mb": 3,
        "compile_model": False,
        "enable_kernel_fusion": False,
        "enable_adaptive_batching": True,
        "enable_early_stopping": False,
        "profile_performance": True,
    }


@pytest.mark.parametrize("flag", flags_that_act())
def test_every_flag_changes_what_the_engine_or_the_sampler_is_told(flag: str) -> None:
    """Most flags of an earlier engine were never read."""
    plain, other = OptimizationConfig(), OptimizationConfig(**{flag: flags_that_act()[flag]})
    assert (plain.engine_settings(), plain.sampling()) != (other.engine_settings(), other.sampling())
    SamplingParams(**other.sampling())


def test_the_flags_above_are_all_but_those_with_one_value_and_the_log() -> None:
    silent = {"use_flash_attention", "memory_efficient_attention", "enable_gradient_checkpointing", "log_optimizations"}
    assert flags_that_act().keys() == OptimizationConfig.model_fields.keys() - silent


@pytest.mark.parametrize("level", OptimizationLevel)
def test_nothing_that_a_caller_draws_with_is_touched(level: OptimizationLevel) -> None:
    """An earlier engine replaced the caller's temperature by one that followed latency."""
    assert OptimizationConfig(level=level).sampling().keys() <= {"ignore_eos", "best_of", "rank_by"}


def test_the_best_is_the_likeliest_by_length_or_what_a_function_likes() -> None:
    assert OptimizationConfig().sampling() == {"ignore_eos": False, "best_of": 4, "rank_by": "normalized_logprob"}
    assert OptimizationConfig(sample_aggregation=len).sampling()["rank_by"] is len


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"dynamic_temperature": 0.5}, "another temperature would change"),
        ({"acceptance_threshold": 0.9}, "a threshold would change the output"),
        ({"draft_model_ratio": 0.5}, "cannot be cut out of a larger one"),
        ({"use_flash_attention": False}, "attention always reads K/V block by block"),
        ({"memory_efficient_attention": False}, "attention always reads K/V block by block"),
        ({"sample_aggregation": "worst"}, "choose from 'best', 'ensemble', 'random', "),
        ({"level": "fastest"}, "level='fastest' is not available"),
        ({"speculation_length": 0}, "speculation_length"),
        ({"speculation_lenght": 4}, "did you mean 'speculation_length'"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        OptimizationConfig(**flags)
    config = OptimizationConfig()
    ((name, value),) = flags.items()
    with pytest.raises(ConfigurationError, match=reason):
        setattr(config, name, value)


def test_meaningless_flags_that_are_off_are_let_through() -> None:
    config = OptimizationConfig(**dict.fromkeys(MEANINGLESS, None))
    config.dynamic_temperature = False
    assert config == OptimizationConfig()


def test_every_flag_of_the_original_is_accepted_at_its_default_there(caplog: pytest.LogCaptureFixture) -> None:
    """004-102: the ones without a meaning are named once, with the reason."""
    flags: dict[str, Any] = {
        "level": OptimizationLevel.BASIC,
        "enable_speculative_decoding": True,
        "draft_model_ratio": 0.25,
        "speculation_length": 4,
        "acceptance_threshold": 0.8,
        "enable_parallel_sampling": True,
        "num_parallel_samples": 4,
        "sample_aggregation": "best",
        "enable_memory_pooling": True,
        "pool_size_mb": 2048,
        "enable_gradient_checkpointing": False,
        "memory_efficient_attention": True,
        "enable_kernel_fusion": True,
        "compile_model": True,
        "use_flash_attention": True,
        "enable_adaptive_batching": True,
        "enable_early_stopping": True,
        "dynamic_temperature": True,
        "profile_performance": True,
        "log_optimizations": True,
    }
    warn_of_no_effect.cache_clear()
    config = OptimizationConfig(**flags)
    OptimizationConfig(**flags)
    assert config.engine_settings()["logits_chunk_bytes"] == 2048 * 2**20
    assert config.sampling() == {"ignore_eos": False, "best_of": 4, "rank_by": "normalized_logprob"}
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(message.split()[0] for message in messages) == sorted(MEANINGLESS)
    assert all(" has no effect: " in message for message in messages)


def test_an_ensemble_is_a_consensus_and_a_random_candidate_is_one_sample() -> None:
    """004-102: a vote at every position made a text that nothing had generated."""
    assert OptimizationConfig(sample_aggregation="ensemble").sampling()["rank_by"] == "consensus"
    assert OptimizationConfig(sample_aggregation="random").sampling() == {"ignore_eos": False}


def test_fusion_is_a_rewrite_and_compiled_models_run_on_packed_weights() -> None:
    assert OptimizationConfig().engine_settings()["disabled_rewrites"] == ()
    assert OptimizationConfig(enable_kernel_fusion=False).engine_settings()["disabled_rewrites"] == ("fused_layers",)
    modes = [OptimizationConfig(compile_model=on).engine_settings()["weight_mode"] for on in (True, False)]
    assert modes == ["packed", "shared"]


def test_adaptive_batching_follows_the_goal_of_the_level() -> None:
    def goal(level: OptimizationLevel, **flags: Any) -> Any:
        return OptimizationConfig(level=level, **flags).engine_settings()["target"]

    assert [goal(level) for level in OptimizationLevel] == [None, "throughput", "latency", None]
    assert [goal(level, enable_adaptive_batching=False) for level in OptimizationLevel] == [None] * 4
    assert goal(OptimizationLevel.BASIC, enable_adaptive_batching=True) == "throughput"

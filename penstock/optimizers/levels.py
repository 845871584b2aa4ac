"""`OptimizationConfig`: the goal of the optimization, as a level and flags, translated into settings of the engine.

Owns what each level and flag turns on, and the explanations of flags that have no meaning in inference. Never measures,
loads or runs anything. Built by callers; `PerformanceOptimizer` reads `engine_settings()` and `sampling()`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from penstock.config import BatchingStrategy, explained
from penstock.errors import ConfigurationError, shown
from penstock.sampling import RANKINGS, RankFunction

MIB = 1024**2


class OptimizationLevel(StrEnum):
    """The goal that comes first; `PRESETS` has what each level turns on."""

    BASIC = "basic"
    AGGRESSIVE = "aggressive"
    LATENCY_OPTIMIZED = "latency_optimized"
    MEMORY_OPTIMIZED = "memory_optimized"


@dataclass(frozen=True, slots=True)
class Preset:
    """A level: settings of `EngineConfig`, and defaults for flags of `OptimizationConfig`."""

    purpose: str
    engine: Mapping[str, object]
    flags: Mapping[str, object]


PRESETS = {
    OptimizationLevel.BASIC: Preset("the engine's defaults", {}, {}),
    OptimizationLevel.AGGRESSIVE: Preset(
        "the most tokens per second: large batches and chunks, a large cache, tuned for throughput",
        {"max_batch_size": 64, "max_num_batched_tokens": 2048, "batch_timeout_ms": 5.0, "memory_pool_size": 2048 * MIB},
        {"enable_adaptive_batching": True, "speculation_length": 8},
    ),
    OptimizationLevel.LATENCY_OPTIMIZED: Preset(
        "the lowest latency of few streams: no coalescing wait, small chunks, one candidate",
        {"max_batch_size": 8, "max_num_batched_tokens": 256, "batch_timeout_ms": 0.0, "preallocate_kv_cache": True},
        {"enable_adaptive_batching": True, "enable_parallel_sampling": False, "speculation_length": 8},
    ),
    OptimizationLevel.MEMORY_OPTIMIZED: Preset(
        "the least memory: a small cache that is never overcommitted, small steps, a single copy of the weights",
        {
            "memory_pool_size": 256 * MIB,
            "kv_cache_max_size": 256,
            "batching_strategy": BatchingStrategy.MEMORY_AWARE,
            "max_batch_size": 8,
            "max_num_batched_tokens": 256,
            "logits_chunk_bytes": 32 * MIB,
            "gc_threshold": 0.5,
        },
        {"compile_model": False, "enable_parallel_sampling": False},
    ),
}

# Flags of other engines that have no meaning here: the default there, which is accepted with a warning, and why.
MEANINGLESS: dict[str, tuple[object, str]] = {
    "draft_model_ratio": (
        0.25,
        "a draft model has to be trained and cannot be cut out of a larger one by a ratio: name one with "
        "draft_model='folder or hub id', or none to draft from the text itself",
    ),
    "acceptance_threshold": (
        0.8,
        "a threshold would change the output. Drafts are accepted by the model's probabilities, and speculation pauses "
        "automatically where it does not pay: leave it out",
    ),
    "dynamic_temperature": (
        True,
        "another temperature would change the output, and it is the caller's choice. enable_adaptive_batching=True "
        "tunes chunks, batches and drafts instead: leave it out",
    ),
}
# Flags that have a single value, and why.
ALWAYS = "attention always reads K/V block by block and never stores a score for each pair of tokens"
ONE_VALUE = {"use_flash_attention": ALWAYS, "memory_efficient_attention": ALWAYS}
# Names of rankings in other engines. A random choice among independent samples is a single sample.
AGGREGATIONS: dict[str, str | None] = {
    "best": "normalized_logprob",
    "ensemble": "consensus",
    "random": None,
    **{name: name for name in RANKINGS},
}
NO_AGGREGATION = f"choose from {', '.join(map(repr, AGGREGATIONS))}, or a function of a completion"
NO_CHECKPOINTS = "no effect: it recomputes activations for a backward pass, and inference stores none"


class OptimizationConfig(BaseModel):
    """What a `PerformanceOptimizer` turns on. A flag that is not given has the level's value, or else the one here.

    `sample_aggregation` is "best" or "normalized_logprob" (likelihood by length), "cumulative_logprob", "ensemble" or
    "consensus" (the candidate that agrees most with the others), "random" (one sample, as likely as any), or a function
    of a `CompletionOutput`; the completion with the highest value wins. `enable_gradient_checkpointing` is accepted
    because training configurations contain it; it has no effect. Assigning a level also sets its flags. Assignments
    take effect with the next generation, which refuses them if the setting is only read while the model is loaded.
    Invalid and unknown values raise `ConfigurationError`. So do flags of other engines that have no meaning here,
    except at their defaults there, which are named in a warning.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    level: OptimizationLevel = Field(OptimizationLevel.BASIC, description="The goal that comes first.")
    enable_speculative_decoding: bool = Field(True, description="Draft tokens and verify several at once; same output.")
    speculation_length: int = Field(4, ge=1, description="Maximum length of a draft.")
    draft_model: str | None = Field(None, description="Folder or hub id of a draft model; None: draft from the text.")
    enable_parallel_sampling: bool = Field(True, description="Sample several candidates and return the best.")
    num_parallel_samples: int = Field(4, ge=1, description="Candidates per prompt; one where sampling is greedy.")
    sample_aggregation: Any = Field("best", description="Which candidate is the best.")
    enable_memory_pooling: bool = Field(True, description="Reuse the memory of a step's logits in the next.")
    pool_size_mb: float | None = Field(None, gt=0, description="Maximum MiB of logits at once; None: engine default.")
    compile_model: bool = Field(True, description="Run layers on compiled CPU kernels, with packed weights.")
    enable_kernel_fusion: bool = Field(True, description="Run each decoder layer as one kernel call.")
    use_flash_attention: bool = Field(True, description="Always on.")
    memory_efficient_attention: bool = Field(True, description="Always on.")
    enable_gradient_checkpointing: bool = Field(False, description="Accepted; no effect in inference.")
    enable_adaptive_batching: bool = Field(False, description="Chunks, batches, drafts follow measured step times.")
    enable_early_stopping: bool = Field(True, description="Stop at the end-of-text token, not only at max_length.")
    profile_performance: bool = Field(False, description="Add engine statistics to each generation; log steps.")
    log_optimizations: bool = Field(False, description="Log the active optimizations at INFO level, once loaded.")

    def __init__(self, **values: Any) -> None:
        preset = PRESETS.get(values.get("level", OptimizationLevel.BASIC))
        with explained(OptimizationConfig.model_fields):
            super().__init__(**{**(preset.flags if preset else {}), **_accepted(values)})
        self.model_fields_set.intersection_update(values)  # without those of the level

    def __setattr__(self, name: str, value: object) -> None:
        with explained(OptimizationConfig.model_fields):
            for accepted in _accepted({name: value}):
                super().__setattr__(accepted, value)
        if name == "level":
            self._follow_level()

    @field_validator(*ONE_VALUE)
    @classmethod
    def _check_single_value(cls, value: bool, info: ValidationInfo) -> bool:
        if not value:
            raise PydanticCustomError("always", "{why}: leave it out", {"why": ONE_VALUE[str(info.field_name)]})
        return value

    @field_validator("sample_aggregation")
    @classmethod
    def _check_aggregation(cls, value: object) -> object:
        if callable(value) or (isinstance(value, str) and value in AGGREGATIONS):
            return value
        raise PydanticCustomError("aggregation", "{choice}", {"choice": NO_AGGREGATION})

    @property
    def preset(self) -> Preset:
        """The settings of the level."""
        return PRESETS[self.level]

    def engine_settings(self) -> dict[str, Any]:
        """Keywords of `EngineConfig`, by the level and the flags."""
        goal = "latency" if self.level is OptimizationLevel.LATENCY_OPTIMIZED else "throughput"
        settings = {
            **self.preset.engine,
            "enable_speculative_decoding": self.enable_speculative_decoding,
            "speculation_length": self.speculation_length,
            "draft_model": self.draft_model,
            "enable_memory_pooling": self.enable_memory_pooling,
            "weight_mode": "packed" if self.compile_model else "shared",
            "disabled_rewrites": () if self.enable_kernel_fusion else ("fused_layers",),
            "target": goal if self.enable_adaptive_batching else None,
            "enable_gradient_checkpointing": self.enable_gradient_checkpointing,
            "profile_performance": self.profile_performance,
        }
        if self.pool_size_mb is not None:
            settings["logits_chunk_bytes"] = int(self.pool_size_mb * MIB)
        return settings

    def sampling(self) -> dict[str, Any]:
        """Keywords of `SamplingParams`; never the temperature or another parameter of the distribution."""
        params: dict[str, Any] = {"ignore_eos": not self.enable_early_stopping}
        rank_by = ranking_of(self.sample_aggregation)
        if self.enable_parallel_sampling and self.num_parallel_samples > 1 and rank_by is not None:
            params |= {"best_of": self.num_parallel_samples, "rank_by": rank_by}
        return params

    def _follow_level(self) -> None:
        explicit = {name: getattr(self, name) for name in self.model_fields_set}
        self.__dict__.update(OptimizationConfig(**explicit).__dict__)


def ranking_of(aggregation: str | RankFunction) -> str | RankFunction | None:
    """The `rank_by` of an aggregation; None for one that takes any sample. Raises `ConfigurationError`."""
    if callable(aggregation):
        return aggregation
    if aggregation not in AGGREGATIONS:
        raise ConfigurationError(f"{NO_AGGREGATION}, got {shown(aggregation)}")
    return AGGREGATIONS[aggregation]


def _accepted(values: Mapping[str, object]) -> dict[str, object]:
    """The values without `MEANINGLESS` flags. Raises `ConfigurationError` where one asks for something."""
    for name in MEANINGLESS.keys() & values.keys():
        default, reason = MEANINGLESS[name]
        if values[name] == default:
            warn_of_no_effect(name, reason)
        elif values[name]:
            raise ConfigurationError(f"{name}={values[name]!r} is not available: {reason}")
    return {name: value for name, value in values.items() if name not in MEANINGLESS}


@lru_cache
def warn_of_no_effect(name: str, reason: str) -> None:
    """Warn, once per process and name."""
    logging.getLogger("penstock").warning("%s has no effect: %s", name, reason)

"""`OptimizationConfig`: what to optimize for, as a level and flags, translated into settings of the engine.

Owns what each level and flag turns on, and the reasons for what means nothing in inference. Never measures, loads or
runs anything. Built by callers; `PerformanceOptimizer` asks for `engine_settings()` and `sampling()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from penstock.config import BatchingStrategy, explained
from penstock.errors import ConfigurationError
from penstock.sampling import RANKINGS

MIB = 1024**2


class OptimizationLevel(StrEnum):
    """What matters most; `PRESETS` says what each turns on."""

    BASIC = "basic"
    AGGRESSIVE = "aggressive"
    LATENCY_OPTIMIZED = "latency_optimized"
    MEMORY_OPTIMIZED = "memory_optimized"


@dataclass(frozen=True, slots=True)
class Preset:
    """A level: settings of `EngineConfig`, and flags of `OptimizationConfig` where they are not given."""

    purpose: str
    engine: Mapping[str, Any]
    flags: Mapping[str, Any]


PRESETS = {
    OptimizationLevel.BASIC: Preset("the engine's own settings", {}, {}),
    OptimizationLevel.AGGRESSIVE: Preset(
        "the most tokens per second: large batches and chunks, a large cache, tuned for throughput",
        {"max_batch_size": 64, "max_num_batched_tokens": 2048, "batch_timeout_ms": 5.0, "memory_pool_size": 2048 * MIB},
        {"enable_adaptive_batching": True, "speculation_length": 8},
    ),
    OptimizationLevel.LATENCY_OPTIMIZED: Preset(
        "the shortest waits of few streams: no waiting for others, small chunks, one candidate, tuned for latency",
        {"max_batch_size": 8, "max_num_batched_tokens": 256, "batch_timeout_ms": 0.0, "preallocate_kv_cache": True},
        {"enable_adaptive_batching": True, "enable_parallel_sampling": False, "speculation_length": 8},
    ),
    OptimizationLevel.MEMORY_OPTIMIZED: Preset(
        "the least memory: a small cache that is never overcommitted, small steps, weights held once",
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

# Flags of other engines that cannot be granted, and why.
REFUSED = {
    "draft_model_ratio": "a smaller model is trained, it cannot be cut out of a larger one by a ratio: name one with "
    "draft_model='folder or hub id', or name none, and drafts are made from the text itself",
    "acceptance_threshold": "a threshold would change what is generated. Drafts are accepted by the model's own "
    "probabilities, and speculation pauses by itself where it does not pay: leave it out",
    "dynamic_temperature": "the temperature is the caller's, and another one gives other texts. "
    "enable_adaptive_batching=True tunes chunks, batches and drafts instead: leave it out",
}
# Flags that have one value only, and why.
ALWAYS = "attention always reads K/V from pages, tile by tile, and never holds a score for each pair of tokens"
ONE_VALUE = {"use_flash_attention": ALWAYS, "memory_efficient_attention": ALWAYS}
AGGREGATIONS = ("best", *RANKINGS)
NO_AGGREGATION = {
    "random": "a random one of independent samples is a sample like any other: set enable_parallel_sampling=False",
    "ensemble": "a vote at each position mixes texts that say different things: use 'best', or a function",
}
NO_CHECKPOINTS = "no effect: it saves activations that a backward pass would need, and inference keeps none"


class OptimizationConfig(BaseModel):
    """What a `PerformanceOptimizer` turns on; flags that were not given are as the level says, else as here.

    `sample_aggregation` is "best" or "normalized_logprob" (likelihood by length), "cumulative_logprob", or a function
    of a `CompletionOutput`: the higher, the better. `enable_gradient_checkpointing` is accepted because training
    setups carry it; it has no effect. A level that is assigned brings its flags along. Assignments count from the next
    generation on, or are refused there if the setting is read when the model is loaded. Wrong, unknown
    and meaningless values raise `ConfigurationError`.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    level: OptimizationLevel = Field(OptimizationLevel.BASIC, description="What matters most.")
    enable_speculative_decoding: bool = Field(True, description="Guess tokens, verify several at once; same output.")
    speculation_length: int = Field(4, ge=1, description="Most tokens to guess at once.")
    draft_model: str | None = Field(None, description="Folder or hub id of who guesses; None: the text itself.")
    enable_parallel_sampling: bool = Field(True, description="Draw several candidates and return the best.")
    num_parallel_samples: int = Field(4, ge=1, description="Candidates for each prompt; one where nothing is drawn.")
    sample_aggregation: Any = Field("best", description="Which candidate is the best.")
    enable_memory_pooling: bool = Field(True, description="Use the memory of a step's logits again in the next.")
    pool_size_mb: float | None = Field(None, gt=0, description="Most MiB of logits at once; None: the engine's own.")
    compile_model: bool = Field(True, description="Run layers on compiled CPU kernels, over packed copies of weights.")
    enable_kernel_fusion: bool = Field(True, description="Make each decoder layer one call of the kernels.")
    use_flash_attention: bool = Field(True, description="Always on.")
    memory_efficient_attention: bool = Field(True, description="Always on.")
    enable_gradient_checkpointing: bool = Field(False, description="Accepted; no effect in inference.")
    enable_adaptive_batching: bool = Field(False, description="Chunks, batches, drafts follow measured step times.")
    enable_early_stopping: bool = Field(True, description="End at the model's end of text, not at max_length only.")
    profile_performance: bool = Field(False, description="The engine's figures with each generation; steps at DEBUG.")
    log_optimizations: bool = Field(False, description="Log at INFO level what is on, once loaded.")

    def __init__(self, **values: Any) -> None:
        preset = PRESETS.get(values.get("level", OptimizationLevel.BASIC))
        with explained(OptimizationConfig.model_fields):
            super().__init__(**{**(preset.flags if preset else {}), **_granted(values)})
        self.model_fields_set.intersection_update(values)  # not those of the level

    def __setattr__(self, name: str, value: Any) -> None:
        with explained(OptimizationConfig.model_fields):
            for granted in _granted({name: value}):
                super().__setattr__(granted, value)
        if name == "level":
            self._follow_level()

    @field_validator(*ONE_VALUE)
    @classmethod
    def _always(cls, value: bool, info: ValidationInfo) -> bool:
        if not value:
            raise PydanticCustomError("always", "{why}: leave it out", {"why": ONE_VALUE[str(info.field_name)]})
        return value

    @field_validator("sample_aggregation")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if callable(value) or value in AGGREGATIONS:
            return value
        choice = f"choose from {', '.join(map(repr, AGGREGATIONS))}, or a function of a completion"
        raise PydanticCustomError("aggregation", "{why}", {"why": NO_AGGREGATION.get(str(value), choice)})

    @property
    def preset(self) -> Preset:
        """What the level turns on."""
        return PRESETS[self.level]

    def engine_settings(self) -> dict[str, Any]:
        """Keywords of `EngineConfig`, of the level and of the flags."""
        goal = "latency" if self.level is OptimizationLevel.LATENCY_OPTIMIZED else "throughput"
        found = {
            **self.preset.engine,
            "enable_speculative_decoding": self.enable_speculative_decoding,
            "speculation_length": self.speculation_length,
            "draft_model": self.draft_model,
            "enable_memory_pooling": self.enable_memory_pooling,
            "compile_model": self.compile_model,
            "disabled_rewrites": self._without(),
            "target": goal if self.enable_adaptive_batching else None,
            "enable_gradient_checkpointing": self.enable_gradient_checkpointing,
            "profile_performance": self.profile_performance,
        }
        return found if self.pool_size_mb is None else found | {"logits_chunk_bytes": int(self.pool_size_mb * MIB)}

    def sampling(self) -> dict[str, Any]:
        """Keywords of `SamplingParams`. Never the temperature, nor anything else that a caller draws with."""
        found: dict[str, Any] = {"ignore_eos": not self.enable_early_stopping}
        if self.enable_parallel_sampling and self.num_parallel_samples > 1:
            rank_by = "normalized_logprob" if self.sample_aggregation == "best" else self.sample_aggregation
            found |= {"best_of": self.num_parallel_samples, "rank_by": rank_by}
        return found

    def _follow_level(self) -> None:
        given = {name: getattr(self, name) for name in self.model_fields_set}
        self.__dict__.update(OptimizationConfig(**given).__dict__)

    def _without(self) -> tuple[str, ...]:
        """The rewrites to leave out."""
        if not self.compile_model:
            return ("fused_layers", "packed_linears", "packed_norms")
        return () if self.enable_kernel_fusion else ("fused_layers",)


def _granted(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without flags of other engines that are off. Raises `ConfigurationError` for one that is on."""
    for name in REFUSED.keys() & values.keys():
        if values[name]:
            raise ConfigurationError(f"{name}={values[name]!r} is not available: {REFUSED[name]}")
    return {name: value for name, value in values.items() if name not in REFUSED}

"""`EngineConfig`: every setting of the engine, with a sentence each.

Values come from keywords, then environment variables (`PENSTOCK_MAX_BATCH_SIZE=8`), then a YAML file
(`EngineConfig.from_yaml(path)`), then the defaults. Fields stay assignable while the engine runs; an assignment is
validated and takes effect at the next step where the field's sentence does not say otherwise. Unknown names raise
`ConfigurationError` with the nearest known one.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from numbers import Number
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from penstock.errors import ConfigurationError, shown
from penstock.values import plain

GIB = 1024**3
LARGEST, LARGEST_FLOAT = 2**63 - 1, 1e12  # of any setting that is an int, or a float


# Other engines' names for the same settings, accepted as keywords and in YAML.
ALIASES = {
    "max_num_seqs": "max_batch_size",
    "max_model_len": "max_sequence_length",
    "prefill_chunk_size": "max_num_batched_tokens",
    "max_num_queued_reqs": "max_queue_size",
    "max_num_queued_tokens": "max_queued_tokens",
    "kv_cache_bytes": "memory_pool_size",
    "enable_prefix_caching": "enable_kv_cache",
}

# What `disabled_rewrites` may name: the passes of `optimizers.rewriting`, and all of them with the kernels they need.
REWRITES = ("kernels", "fused_layers", "packed_linears", "packed_norms")


# A setting's value.
Value = str | int | float | bool | tuple[str, ...] | None


class BatchingStrategy(StrEnum):
    """Who of the waiting starts together; `scheduling.packing` says how each does it."""

    NAIVE = "naive"  # a static batch: nobody joins until all of it is done
    BUCKETED = "bucketed"  # sequences of similar length start together
    MEMORY_AWARE = "memory_aware"  # only what memory holds to its very end starts
    CONTINUOUS = "continuous"  # whoever is next starts as soon as there is room


class EngineConfig(BaseSettings):
    """Settings of an `InferenceEngine`."""

    model_config = SettingsConfigDict(
        env_prefix="PENSTOCK_", extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )

    # Batching
    max_batch_size: int = Field(32, ge=1, description="Most sequences that run in one step.")
    max_sequence_length: int | None = Field(2048, ge=1, description="Most tokens of one sequence, prompt and output; cut to what the model can, with a warning where it was set. None: the model's own limit. Read at start.")
    max_num_batched_tokens: int = Field(512, ge=1, description="Most tokens of one step; longer prompts are prefilled in chunks, so that nobody's stream stalls.")
    batch_timeout_ms: float = Field(50.0, ge=0, description="Longest an idle engine waits to coalesce a burst of first arrivals. The wait ends as soon as the burst pauses, so a lone request hardly waits; 0 never waits.")
    batching_strategy: BatchingStrategy = Field(BatchingStrategy.CONTINUOUS, description="Who of the waiting starts together: continuous (whoever is next), bucketed (similar lengths), memory_aware (only what fits to its very end) or naive (static batches). Read at start.")
    bucket_size: int = Field(128, ge=0, description="Largest difference of lengths, in tokens, among sequences that start together under batching_strategy=bucketed. Read at start.")
    memory_limit_mb: float | None = Field(None, gt=0, description="MiB that weights and K/V of all running sequences may come to at their full lengths under batching_strategy=memory_aware; None: what the K/V cache holds. Read at start.")
    enable_dynamic_batching: bool = Field(True, description="False ignores batching_strategy: whoever is next starts. Read at start.")
    enable_continuous_batching: bool = Field(True, description="False makes static batches, whatever batching_strategy says: nobody joins until all of a batch is done. Read at start.")

    # Tuning
    target: Literal["latency", "throughput"] | None = Field(None, description="What the engine tunes itself for, from measured step times: latency keeps the time between tokens under max_inter_token_ms, throughput makes the most tokens. Settings that were given stay limits. None: it keeps to the settings.")
    max_inter_token_ms: float = Field(60.0, gt=0, description="Longest time between two tokens of a stream that target=latency allows, for 99 of 100 of them.")

    # Queue
    max_queue_size: int = Field(1000, ge=1, description="Most requests that may wait; one more raises EngineOverloaded.")
    max_queued_tokens: int | None = Field(None, ge=1, description="Most prompt tokens that may wait; None is no limit.")
    priority_boost_threshold: float = Field(5.0, ge=1e-6, description="Seconds of waiting after which a request moves one priority class forward in the queue, so that nothing starves.")
    default_max_tokens: int = Field(
        256,
        ge=1,
        description="New tokens of a request without any parameters, where the model's generation config sets none.",
    )

    # K/V cache, read at start
    block_size: int = Field(16, ge=1, le=256, description="Tokens per cache block.")
    memory_pool_size: int | None = Field(GIB, ge=1, description="Bytes of the K/V cache; where less is free, it is cut to 90 % of that, with a warning. None: see gpu_memory_utilization.")
    kv_cache_tokens: int | None = Field(None, ge=1, description="Tokens the K/V cache holds; overrides memory_pool_size.")
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1, description="Fraction of the device's free memory (a CPU's: of a quarter of it) that the K/V cache takes; overrides memory_pool_size.")
    preallocate_kv_cache: bool = Field(False, description="Touch the cache's memory while the engine starts, and refuse a cache that is larger than what is free: a slower start, but no step waits for the system to find a page. Without it, memory is taken as the cache fills.")
    enable_kv_cache: bool = Field(True, description="Reuse K/V of shared prefixes across requests. Within a request K/V is always cached. Read at start.")
    kv_cache_max_size: int | None = Field(None, ge=1, description="Most cached prefix blocks kept after their requests ended; None is as many as fit.")
    swap_space: float = Field(0, ge=0, description="GiB of host memory for K/V blocks that had to leave the cache, those of preempted requests among them. They are read back where that takes less time than computing them again; 0 keeps none. Read at start.")

    # Model, read at load
    device: str = Field("auto", description='"auto", "cpu", "cuda" or "cuda:1".')
    dtype: str = Field("auto", description='"auto" (the checkpoint\'s), "float32", "float16" or "bfloat16".')
    tokenizer: str | None = Field(None, description="Hub id or folder of the tokenizer; None: the model's.")
    tokenizer_mode: Literal["auto", "slow"] = Field("auto", description='"slow" loads the Python tokenizer, for debugging.')
    skip_tokenizer_init: bool = Field(False, description="Serve token ids only; no tokenizer is loaded.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the checkpoint.")
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the hub.")
    tokenizer_revision: str | None = Field(None, description="Branch, tag or commit of the tokenizer on the hub.")
    download_dir: str | None = Field(None, description="Where hub downloads are kept; None: the hub library's own folder.")
    load_format: Literal["auto", "safetensors", "pt"] = Field("auto", description="Which weight files to read.")
    quantization: Literal["int8"] | None = Field(None, description='"int8" packs the weights as 8-bit integers with a scale per output and quantizes activations per token, both after a rotation that spreads outlier channels (CPU). None keeps the checkpoint\'s precision.')
    kv_cache_dtype: Literal["auto", "int8"] = Field("auto", description='"int8" stores keys and values in a byte each with a scale per token and head, after the same rotation (CPU): twice the tokens in the same memory.')
    verify_model: bool = Field(True, description="At load, compare a short paged forward pass with the model's own.")
    seed: int | None = Field(None, description="Seeds the requests that bring no seed; None draws fresh randomness. Read at construction.")

    # Sampling
    max_logprobs: int = Field(20, ge=-1, description="Most logprobs or prompt_logprobs of a request; -1 allows the whole vocabulary, which is slow and large.")
    logits_chunk_bytes: int = Field(256 * 1024**2, ge=1, description="Most bytes of full-vocabulary logits at once. Read at start.")

    # Speed and memory
    enable_speculative_decoding: bool = Field(False, description="Guess the next tokens and verify several in one step. The output stays the same; where it does not pay, it pauses by itself.")
    speculation_length: int = Field(8, ge=1, description="Most tokens to guess at once; how many it is follows what guesses were worth, request by request, and how full the batch is.")
    drafter: Literal["auto", "ngram", "suffix", "draft_model"] = Field("auto", description='Who guesses: "ngram" expects a text to repeat itself, prompt included, "suffix" also what other requests of its namespace were answered, "draft_model" runs a smaller model. "auto": draft_model where one is given, else ngram. Read at start.')
    draft_model: str | None = Field(None, description="Folder or hub id of a smaller model with the same vocabulary. Loaded at start, if enable_speculative_decoding is set by then; set later, guesses are those of ngram.")
    num_threads: int | None = Field(None, ge=1, description="Threads that compute on the CPU; None: one for each core this process may use. Read at load.")
    deterministic: bool = Field(False, description="Promise that a request's tokens and logprobs are bitwise the same whatever runs beside it (CPU); a model for which that cannot hold is refused. Read at load.")
    compile_model: bool = Field(False, description="Run a live module's layers on the compiled CPU kernels too, over packed copies of its weights: faster by multiples, but changes of the weights after loading do not show, and changed adapters or hooks end the requests. A model that the engine loads itself always runs so. Read at load.")
    disabled_rewrites: tuple[str, ...] = Field((), description='Rewrites to leave out when a model is loaded: "kernels" (all of them), "fused_layers", "packed_linears", "packed_norms".')
    enable_memory_pooling: bool = Field(True, description="Keep the memory of a step's logits for the next step. Read at load.")
    gc_threshold: float = Field(0.8, gt=0, le=1, description="Fraction of memory use above which an engine that turns idle gives back what it holds without need, as optimize_memory() does; cached prefixes stay.")
    enable_gradient_checkpointing: bool = Field(False, description="Accepted for callers that carry it: it has no meaning in inference.")
    memory_efficient_attention: bool = Field(True, description="Accepted for callers that carry it: attention is always paged.")

    # Observability
    enable_metrics: bool = Field(True, description="Collect latency and throughput figures. Read at construction.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field("INFO", description="Least level of this engine's own log events. Read at construction.")
    profile_performance: bool = Field(False, description="Log the time of every step at DEBUG level.")

    @field_validator("*", mode="before")
    @classmethod
    def _take_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """A scalar of numpy stands for its number; a bool, a `Decimal` or a fraction stands for none."""
        value = plain(value)
        kind = cls.model_fields[info.field_name or ""].annotation
        if {int, float} & {kind, *get_args(kind)} and isinstance(value, Number) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PydanticCustomError("no_number", "Input should be an int or a float")
        return value

    @field_validator("*")
    @classmethod
    def _bound_numbers(cls, value: Any) -> Any:
        largest = LARGEST if isinstance(value, int) else LARGEST_FLOAT
        if isinstance(value, int | float) and abs(value) > largest:
            raise PydanticCustomError("too_large", "Input should be at most {largest}", {"largest": largest})
        return value

    @field_validator("disabled_rewrites")
    @classmethod
    def _check_rewrites(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in REWRITES:
                near = difflib.get_close_matches(name, REWRITES, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(REWRITES)}"
                raise PydanticCustomError("unknown_rewrite", "there is no rewrite {name}: {hint}", {"name": repr(name), "hint": hint})
        return names

    def __init__(self, **values: Any) -> None:
        with explained((*EngineConfig.model_fields, *ALIASES)):
            super().__init__(**canonical(values))

    def __setattr__(self, name: str, value: Any) -> None:
        with explained((*EngineConfig.model_fields, *ALIASES)):
            super().__setattr__(ALIASES.get(name, name), value)

    @classmethod
    def from_yaml(cls, path: str | Path) -> EngineConfig:
        """Read a YAML mapping of field names. Raises `ConfigurationError` when it is missing or not a mapping."""
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigurationError(f"cannot read the configuration {path}: {error}") from None
        if not isinstance(values, dict):
            raise ConfigurationError(f"{path} must hold a mapping of setting names to values")
        return cls(**{name: value for name, value in canonical(values).items() if f"PENSTOCK_{name.upper()}" not in os.environ})


def canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under this project's names. Raises `ConfigurationError` for one that is given twice."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        own = ALIASES.get(name, name)
        if own in found:
            raise ConfigurationError(f"{own} is given twice, once under another name ({name}): leave one out")
        found[own] = value
    return found


@contextlib.contextmanager
def explained(names: Iterable[str]) -> Iterator[None]:
    """Turn a refused setting into a `ConfigurationError` that says what to change; `names` are those there are."""
    try:
        yield
    except ValidationError as error:
        raise ConfigurationError("; ".join(_explain_one(item, names) for item in error.errors())) from None


def _explain_one(item: Any, names: Iterable[str]) -> str:
    name = ".".join(map(str, item["loc"])) or "configuration"
    if item["type"] in ("extra_forbidden", "no_such_attribute"):
        near = difflib.get_close_matches(name, list(names), n=1)
        return f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
    if item["type"] in ("literal_error", "enum"):
        return f"{name}={shown(item.get('input'))} is not available: choose {item['ctx']['expected']}, or leave it out"
    return f"{name}: {item['msg']} (got {shown(item.get('input'))})"


def with_settings(config: EngineConfig | None, settings: dict[str, Any]) -> EngineConfig:
    """The caller's own config object, so that later assignments count; a copy where keywords change it."""
    if config is None:
        return EngineConfig(**settings)
    if not isinstance(config, EngineConfig):
        raise ConfigurationError(
            f"config must be an EngineConfig, got {type(config).__name__}: "
            "write EngineConfig(**settings) or EngineConfig.from_yaml(path)"
        )
    if settings:
        config = config.model_copy()
        for name, value in settings.items():
            setattr(config, name, value)
    return config


def uses_draft_model(config: EngineConfig) -> bool:
    """Whether the settings ask for a draft model."""
    return config.drafter == "draft_model" or (config.drafter == "auto" and config.draft_model is not None)

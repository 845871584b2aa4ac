"""`EngineConfig`: every setting of the engine, with a sentence each.

Values come from keywords, then environment variables (`PENSTOCK_MAX_BATCH_SIZE=8`), then a YAML file
(`EngineConfig.from_yaml(path)`), then the defaults. Assignments are validated. While an engine runs, those of fields that
it reads at start are refused; others take effect at the next step. Unknown names raise an error with the nearest one.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from numbers import Number
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from penstock.errors import ConfigurationError, shown
from penstock.held_settings import HeldSettings
from penstock.values import nearest, plain, split_names

T = TypeVar("T")
GIB = 1024**3
MAX_INT, MAX_FLOAT = 2**63 - 1, 1e12  # of any setting

# Other engines' names for the same settings, accepted as keywords and in YAML.
ALIASES = {
    "max_num_seqs": "max_batch_size",
    "decode_batch_size": "max_batch_size",
    "max_model_len": "max_sequence_length",
    "prefill_chunk_size": "max_num_batched_tokens",
    "max_num_queued_reqs": "max_queue_size",
    "max_num_queued_tokens": "max_queued_tokens",
    "kv_cache_bytes": "memory_pool_size",
    "enable_prefix_caching": "enable_kv_cache",
}

# Valid in `disabled_rewrites`: the passes of `optimizers.rewrites`, and "kernels" for all of them.
REWRITES = ("kernels", "fused_layers", "packed_linears", "packed_norms")

# A setting's value.
Value = str | int | float | bool | tuple[str, ...] | None


class BatchingStrategy(StrEnum):
    """Which waiting sequences start together; implemented in `scheduling.packing`."""

    NAIVE = "naive"  # a static batch: nothing joins until all of it is done
    BUCKETED = "bucketed"  # sequences of similar length start together
    MEMORY_AWARE = "memory_aware"  # only sequences that memory holds until they end start
    CONTINUOUS = "continuous"  # the next in the queue starts as soon as there is room


class EngineSettings(TypedDict, total=False):
    """The keywords of `EngineConfig` except `tokenizer`, for type checkers and editors; see there what each means."""

    max_batch_size: int
    max_sequence_length: int | None
    max_num_batched_tokens: int
    batch_timeout_ms: float
    batching_strategy: BatchingStrategy | Literal["naive", "bucketed", "memory_aware", "continuous"]
    bucket_size: int
    memory_limit_mb: float | None
    enable_dynamic_batching: bool
    enable_continuous_batching: bool
    target: Literal["latency", "throughput"] | None
    max_inter_token_ms: float
    max_queue_size: int
    max_queued_tokens: int | None
    priority_boost_threshold: float
    default_max_tokens: int
    block_size: int
    memory_pool_size: int | None
    kv_cache_tokens: int | None
    gpu_memory_utilization: float | None
    preallocate_kv_cache: bool
    enable_kv_cache: bool
    kv_cache_max_size: int | None
    swap_space: float
    device: str
    dtype: str
    tokenizer_mode: Literal["auto", "slow"]
    skip_tokenizer_init: bool
    trust_remote_code: bool
    revision: str | None
    tokenizer_revision: str | None
    download_dir: str | None
    load_format: Literal["auto", "safetensors", "pt"]
    quantization: Literal["int8"] | None
    kv_cache_dtype: Literal["auto", "int8"]
    verify_model: bool
    seed: int | None
    max_logprobs: int
    logits_chunk_bytes: int
    enable_speculative_decoding: bool | Literal["auto"]
    speculation_length: int
    drafter: Literal["auto", "ngram", "suffix", "draft_model"]
    draft_model: str | None
    num_threads: int | None
    deterministic: bool
    weight_mode: Literal["shared", "packed"] | None
    disabled_rewrites: Sequence[str]
    enable_memory_pooling: bool
    gc_threshold: float
    enable_gradient_checkpointing: bool
    memory_efficient_attention: bool
    enable_metrics: bool
    kept_outputs: int
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    profile_performance: bool
    # Other engines' names.
    max_num_seqs: int
    decode_batch_size: int
    max_model_len: int | None
    prefill_chunk_size: int
    max_num_queued_reqs: int
    max_num_queued_tokens: int | None
    kv_cache_bytes: int | None
    enable_prefix_caching: bool


class Settings(EngineSettings, total=False):
    """All keywords of `EngineConfig`."""

    tokenizer: str | None


class EngineConfig(HeldSettings):
    """Settings of an `InferenceEngine`."""

    model_config = SettingsConfigDict(
        env_prefix="PENSTOCK_", extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )

    # Batching
    max_batch_size: int = Field(32, ge=1, description="Maximum number of sequences in one step.")
    max_sequence_length: int | None = Field(2048, ge=1, description="Maximum tokens of one sequence, prompt and output; lowered to the model's own limit, with a warning if it was set. None: the model's own limit. Read at start.")
    max_num_batched_tokens: int = Field(512, ge=1, description="Maximum tokens of one step; longer prompts are prefilled in chunks, so that streams do not stall.")
    batch_timeout_ms: float = Field(50.0, ge=0, description="Maximum time that an idle engine waits to coalesce a burst of first arrivals. The wait ends as soon as the burst pauses, so a single request hardly waits; 0 never waits.")
    batching_strategy: BatchingStrategy = Field(BatchingStrategy.CONTINUOUS, description="Which waiting sequences start together: continuous (the next in the queue), bucketed (similar lengths), memory_aware (only what fits until it ends) or naive (static batches). Read at start.")
    bucket_size: int = Field(128, ge=0, description="Largest difference of lengths, in tokens, among sequences that start together with batching_strategy=bucketed. Read at start.")
    memory_limit_mb: float | None = Field(None, gt=0, description="Maximum MiB of weights and of the K/V of all running sequences at their full lengths, with batching_strategy=memory_aware; None: what the K/V cache holds. Read at start.")
    enable_dynamic_batching: bool = Field(True, description="False ignores batching_strategy: the next in the queue starts. Read at start.")
    enable_continuous_batching: bool = Field(True, description="False makes static batches, whatever batching_strategy says: nothing joins until all of a batch is done. Read at start.")

    # Tuning
    target: Literal["latency", "throughput"] | None = Field(None, description="What the engine tunes itself for, from measured step times: latency keeps the time between tokens below max_inter_token_ms, throughput maximizes tokens per second. Settings that were given remain upper limits. None: the settings apply as they are.")
    max_inter_token_ms: float = Field(60.0, gt=0, description="Longest time between two tokens of a stream that target=latency allows, at the 99th percentile.")

    # Queue
    max_queue_size: int = Field(1000, ge=1, description="Maximum number of waiting requests; one more raises EngineOverloaded.")
    max_queued_tokens: int | None = Field(None, ge=1, description="Maximum prompt tokens of all waiting requests; None is no limit.")
    priority_boost_threshold: float = Field(5.0, ge=1e-6, description="Seconds of waiting after which a request moves up one priority class in the queue, so that nothing starves.")
    default_max_tokens: int = Field(256, ge=1, description="Maximum new tokens of a request without parameters, unless the model's generation config sets it.")

    # K/V cache, read at start
    block_size: int = Field(16, ge=1, le=256, description="Tokens per cache block.")
    memory_pool_size: int | None = Field(GIB, ge=1, description="Bytes of the K/V cache; cut to 90 % of the free memory, with a warning, if that is less. None: see gpu_memory_utilization.")
    kv_cache_tokens: int | None = Field(None, ge=1, description="Tokens that the K/V cache holds; overrides memory_pool_size.")
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1, description="Fraction of the device's free memory (on a CPU: of a quarter of it) that the K/V cache takes; overrides memory_pool_size.")
    preallocate_kv_cache: bool = Field(False, description="Touch the cache's memory at start, and refuse a cache that is larger than the free memory: a slower start, but no step waits for the operating system to provide a page. Otherwise memory is taken as the cache fills.")
    enable_kv_cache: bool = Field(True, description="Reuse K/V of shared prefixes across requests. Within a request K/V is always cached. Read at start.")
    kv_cache_max_size: int | None = Field(None, ge=1, description="Maximum number of cached prefix blocks kept after their requests ended; None: as many as fit.")
    swap_space: float = Field(0, ge=0, description="GiB of host memory for K/V blocks that are evicted from the cache, including those of preempted requests. They are read back if that takes less time than computing them again; 0 disables it. Read at start.")

    # Model, read at load
    device: str = Field("auto", description='"auto", "cpu", "cuda" or "cuda:1".')
    dtype: str = Field("auto", description='"auto" (the checkpoint\'s), "float32", "float16" or "bfloat16"; of a live module, the dtype of its packed copies.')
    tokenizer: str | None = Field(None, description="Hub id or folder of the tokenizer; None: the model's.")
    tokenizer_mode: Literal["auto", "slow"] = Field("auto", description='"slow" loads the Python tokenizer, for debugging.')
    skip_tokenizer_init: bool = Field(False, description="Serve token ids only, without loading a tokenizer.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the checkpoint.")
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the hub.")
    tokenizer_revision: str | None = Field(None, description="Branch, tag or commit of the tokenizer on the hub.")
    download_dir: str | None = Field(None, description="Folder for downloads from the hub; None: the hub library's own.")
    load_format: Literal["auto", "safetensors", "pt"] = Field("auto", description="Which weight files to read.")
    quantization: Literal["int8"] | None = Field(None, description='"int8" packs the weights as 8-bit integers with a scale per output channel and quantizes activations per token, both after a rotation that spreads outlier channels (CPU). None keeps the checkpoint\'s precision.')
    kv_cache_dtype: Literal["auto", "int8"] = Field("auto", description='"int8" stores keys and values in one byte each with a scale per token and head, after the same rotation (CPU): twice the tokens in the same memory.')
    verify_model: bool = Field(True, description="At load, compare a short paged forward pass with the model's own.")
    seed: int | None = Field(None, description="Seed of requests that have none; None draws fresh randomness. Read at construction.")

    # Sampling
    max_logprobs: int = Field(20, ge=-1, description="Maximum logprobs or prompt_logprobs of a request; -1 allows the whole vocabulary, which is slow and large.")
    logits_chunk_bytes: int = Field(256 * 1024**2, ge=1, description="Maximum bytes of full-vocabulary logits held at once. Read at start.")

    # Speed and memory
    enable_speculative_decoding: bool | Literal["auto"] = Field("auto", description='Draft the next tokens and verify several in one step. The output stays the same; drafting pauses by itself where it does not pay off. "auto": from the text, while at most 4 sequences run, if the model runs on the compiled kernels alone and no logits processor is the caller\'s. True: always. False: never.')
    speculation_length: int = Field(8, ge=1, description="Maximum tokens of a draft; the actual length follows the acceptance rate of each request and the load of the batch.")
    drafter: Literal["auto", "ngram", "suffix", "draft_model"] = Field("auto", description='What drafts: "ngram" continues repetitions within a text, prompt included; "suffix" also those of earlier outputs in the namespace; "draft_model" runs a smaller model. "auto": draft_model if one is set, else ngram. Read at start.')
    draft_model: str | None = Field(None, description="Folder or hub id of a smaller model with the same vocabulary. Loaded at start if enable_speculative_decoding is True by then; otherwise ngram drafts.")
    num_threads: int | None = Field(None, ge=1, description="Number of CPU threads; None: one for each core that this process may use. Read at load.")
    deterministic: bool = Field(False, description="Guarantee that a request's tokens and logprobs are bitwise the same whatever else is in the batch (CPU); models that cannot guarantee it are refused. Read at load.")
    weight_mode: Literal["shared", "packed"] | None = Field(None, description='"shared" runs on the weights where they are: no further bytes, and changes of a live module show at once. "packed" runs on one copy in the layout of the compiled CPU kernels, several times faster; changes of a live module show once the copy is written again. Without these kernels weights stay shared. None: packed for a model that the engine loads, shared for a live module. Read at load.')
    disabled_rewrites: Annotated[tuple[str, ...], NoDecode] = Field((), description='Rewrites to leave out when a model is loaded: "kernels" (all of them), "fused_layers", "packed_linears", "packed_norms".')
    enable_memory_pooling: bool = Field(True, description="Keep the memory of a step's logits for the next step. Read at load.")
    gc_threshold: float = Field(0.8, gt=0, le=1, description="Fraction of memory use above which an engine that becomes idle releases unused memory, as optimize_memory() does; cached prefixes stay.")
    enable_gradient_checkpointing: bool = Field(False, description="Accepted for compatibility: it has no meaning in inference.")
    memory_efficient_attention: bool = Field(True, description="Accepted for compatibility: attention is always paged.")

    # Observability
    enable_metrics: bool = Field(True, description="Collect latency and throughput figures. Read at construction.")
    kept_outputs: int = Field(0, ge=0, description="Number of the latest finished requests whose token ids and logprobs stay in memory for check_logprobs(). Read at construction.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field("INFO", description="Minimum level of this engine's own log events. If it is given and the program configures no logging, they go to stderr. Read at construction.")
    profile_performance: bool = Field(False, description="Log the time of every step; to stderr if the program configures no logging.")

    @field_validator("*", mode="before")
    @classmethod
    def _read_text_and_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Read numpy scalars, "none", and names separated by commas; refuse a bool, a `Decimal` and a fraction."""
        value = split_names(value) if info.field_name == "disabled_rewrites" else plain(value)
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = {kind, *get_args(kind)}
        if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in kinds and str not in kinds:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if {int, float} & kinds and isinstance(value, Number) and not is_number:
            raise PydanticCustomError("no_number", "Input should be an int or a float")
        return value

    @field_validator("*")
    @classmethod
    def _bound_numbers(cls, value: object) -> object:
        largest = MAX_INT if isinstance(value, int) else MAX_FLOAT
        if isinstance(value, int | float) and abs(value) > largest:
            raise PydanticCustomError("too_large", "Input should be at most {largest}", {"largest": largest})
        return value

    @field_validator("quantization", mode="before")
    @classmethod
    def _refuse_four_bits(cls, name: object) -> object:
        if isinstance(name, str) and name in ("awq", "gptq", "squeezellm"):
            why = "4-bit checkpoints cannot be read yet: load the model's original checkpoint, with quantization='int8' if memory is short"
            raise PydanticCustomError("four_bits", "{why}", {"why": why})
        return name

    @field_validator("disabled_rewrites")
    @classmethod
    def _check_rewrites(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in REWRITES:
                hint = nearest(name, REWRITES) or f": choose from {', '.join(REWRITES)}"
                raise PydanticCustomError("unknown_rewrite", "there is no rewrite {name}{hint}", {"name": repr(name), "hint": hint})
        return names

    def __init__(self, **values: Unpack[Settings]) -> None:
        warn_of_misspelled_variables("PENSTOCK_", tuple(EngineConfig.model_fields))
        with explained((*EngineConfig.model_fields, *ALIASES)):
            super().__init__(**canonical(cast(dict[str, Any], values)))

    def __setattr__(self, name: str, value: object) -> None:
        with explained((*EngineConfig.model_fields, *ALIASES)):
            super().__setattr__(ALIASES.get(name, name), value)

    @classmethod
    def from_yaml(cls, path: str | Path) -> EngineConfig:
        """Read a YAML mapping of field names. Raises `ConfigurationError` if it is missing or not a mapping."""
        settings = canonical(read_mapping(path)).items()
        return cls(**cast(Settings, {name: value for name, value in settings if f"PENSTOCK_{name.upper()}" not in os.environ}))


def read_mapping(path: str | Path) -> Mapping[str, object]:
    """A YAML file that holds a mapping of names. Raises `ConfigurationError`."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read the settings {path}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigurationError(f"{path} must hold a mapping of setting names to values")
    return values


def canonical(values: Mapping[str, T]) -> dict[str, T]:
    """The same settings under this project's names. Raises `ConfigurationError` for one that is given twice."""
    settings: dict[str, T] = {}
    for alias, value in values.items():
        name = ALIASES.get(alias, alias)
        if name in settings:
            raise ConfigurationError(f"{name} is given twice, once under another name ({alias}): leave one out")
        settings[name] = value
    return settings


@contextlib.contextmanager
def explained(names: Iterable[str], secrets: Collection[str] = ()) -> Iterator[None]:
    """Turn a validation error into a `ConfigurationError` that says what to change.

    `names` are the valid settings. The values of `secrets` do not appear in the message.
    """
    try:
        yield
    except ValidationError as error:
        raise ConfigurationError("; ".join(_explain(details, names, secrets) for details in error.errors())) from None
    except SettingsError as error:  # names the field, and not its value
        raise ConfigurationError(f"{error}: in the environment it is JSON") from None


def _explain(details: ErrorDetails, names: Iterable[str], secrets: Collection[str]) -> str:
    location = details["loc"]
    name = ".".join(map(str, location)) or "configuration"
    if details["type"] in ("extra_forbidden", "no_such_attribute"):
        return f"unknown setting {name!r}{nearest(name, names)}"
    value = shown(details.get("input"))
    if details["type"] in ("literal_error", "enum"):
        return f"{name}={value} is not available: choose {details['ctx']['expected']}, or leave it out"
    reason = details["msg"].removeprefix("Value error, ")
    is_shown = bool(location) and location[0] not in secrets  # without a location, the value is all settings
    return f"{name}: {reason} (got {value})" if is_shown else f"{name}: {reason}"


@cache
def warn_of_misspelled_variables(prefix: str, names: tuple[str, ...]) -> None:
    """Warn, once per process, of environment variables that look like one of these settings and are not."""
    known = {f"{prefix}{name.upper()}" for name in names}
    for variable in os.environ:
        if variable.startswith(prefix) and variable not in known:
            word = variable.removeprefix(prefix).lower()
            if matches := difflib.get_close_matches(word, names, n=1, cutoff=0.7):
                text = "the environment variable %s is not a setting and has no effect: did you mean %s?"
                logging.getLogger("penstock").warning(text, variable, f"{prefix}{matches[0].upper()}")


def with_settings(config: EngineConfig | None, settings: EngineSettings) -> EngineConfig:
    """The caller's config object itself, so that later assignments take effect; a changed copy if there are `settings`."""
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

"""Translates the constructor arguments of `LLM` and `AsyncEngineArgs` into an `EngineConfig`.

Accepts the names of vLLM's lessons. An argument with a meaning in this engine takes effect; one that has none in a
single process is accepted at its neutral value and refused, with the remedy, at any other.
"""

from __future__ import annotations

from typing import Any

from penstock.config import EngineConfig, EngineSettings, canonical
from penstock.errors import ConfigurationError

# Arguments that only other engines need; any value is harmless.
_IGNORED = frozenset({"disable_custom_all_reduce", "disable_log_requests", "enforce_eager", "max_paddings"})


class EngineArguments(EngineSettings, total=False):
    """The keywords of `LLM` and `AsyncEngineArgs`: those of `EngineConfig`, and vLLM's."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    disable_log_stats: bool
    disable_custom_all_reduce: bool
    disable_log_requests: bool
    enforce_eager: bool
    max_paddings: int


def engine_config(arguments: EngineArguments, defaults: EngineSettings) -> EngineConfig:
    """An `EngineConfig` from the arguments; `defaults` apply to whatever they omit.

    Raises `ConfigurationError` for unknown or invalid arguments.
    """
    explicit = canonical({name: value for name, value in arguments.items() if name not in _IGNORED})
    settings: dict[str, Any] = {**defaults, **explicit}
    if "memory_pool_size" in explicit and "gpu_memory_utilization" not in explicit:
        settings["gpu_memory_utilization"] = None  # explicit bytes take precedence over a default fraction
    _refuse_parallel(settings)
    if settings.get("max_num_batched_tokens", 0) is None:
        del settings["max_num_batched_tokens"]  # None leaves the choice to the engine
    if settings.pop("disable_log_stats", False):
        settings["enable_metrics"] = False
    return EngineConfig(**settings)


def _refuse_parallel(settings: dict[str, object]) -> None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if settings.pop(name, 1) != 1:
            raise ConfigurationError(f"{name} must be 1: this engine runs in one process, on one device")

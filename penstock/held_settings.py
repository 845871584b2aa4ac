"""`HeldSettings`: settings that an engine holds while it runs, and of which then only some can be assigned.

Owns which these are: `EngineConfig` has all settings. Engines call `hold`.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic_settings import BaseSettings

from penstock.errors import ConfigurationError, shown
from penstock.values import plain

# What a running engine reads at every request or step; it read everything else when it started.
LIVE_SETTINGS = frozenset(
    {
        *("max_batch_size", "max_num_batched_tokens", "batch_timeout_ms", "target", "max_inter_token_ms"),
        *("max_queue_size", "max_queued_tokens", "priority_boost_threshold", "default_max_tokens", "max_logprobs"),
        *("enable_speculative_decoding", "speculation_length", "gc_threshold", "profile_performance"),
        *("enable_gradient_checkpointing", "memory_efficient_attention"),  # which have no effect at all
    }
)
# What the one queue of several replicas reads at every request; the replicas have copies of the settings.
QUEUE_SETTINGS = frozenset({"max_queue_size", "max_queued_tokens"})

_holds: dict[object, tuple[HeldSettings, frozenset[str]]] = {}  # of every engine that runs, by a key of its own


class HeldSettings(BaseSettings):
    """While they are held, assigning another value to a setting that is read no more raises `ConfigurationError`."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in type(self).model_fields and not _is_same(value, getattr(self, name)):
            for live in [live for settings, live in list(_holds.values()) if settings is self]:
                if name not in live:
                    raise ConfigurationError(
                        f"{name}={shown(value)} would have no effect, because an engine runs with these settings: make "
                        f"another engine with settings of its own. These can be changed: {', '.join(sorted(live))}"
                    )
        super().__setattr__(name, value)


def hold(settings: HeldSettings, live: frozenset[str]) -> Callable[[], object]:
    """Let only `live` settings of these be assigned until the returned function is called. From any thread."""
    key = object()
    _holds[key] = settings, live
    return lambda: _holds.pop(key, None)


def _is_same(value: object, present: object) -> bool:
    value = plain(value)
    return value is present or (isinstance(value, str | int | float) and value == present)

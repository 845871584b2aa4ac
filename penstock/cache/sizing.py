"""How many blocks the K/V cache and its tier on the host get: pure arithmetic from settings and free memory.

Owns the precedence of the settings, their bounds, and the warning about a cache that is smaller than requested. Never
queries a device. Called once, at load.
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.config import GIB, EngineConfig
from penstock.errors import ConfigurationError

MAX_FREE_SHARE = 0.9  # the rest is for activations, logits and other allocations
MIB = 1024**2


class CacheSize(NamedTuple):
    """The number of blocks, and how many the settings `requested`; `warning` says why there are fewer, if so."""

    blocks: int
    requested: int
    warning: str = ""


def num_blocks(
    config: EngineConfig, bytes_per_token: int, free_bytes: int, max_len: int, max_rows: int, *, share: float = 1.0
) -> CacheSize:
    """Number of K/V blocks, at least one.

    `bytes_per_token` counts K and V of all layers; `free_bytes` is the free memory of the device; `max_len` is the
    maximum length of a sequence, `max_rows` the maximum number of sequences that run; `share` is the part of the free
    memory that gpu_memory_utilization refers to (a quarter on a CPU, whose memory other programs use too). The settings
    take precedence in the order kv_cache_tokens, gpu_memory_utilization, memory_pool_size. None of them takes more than
    90% of `free_bytes`, and only kv_cache_tokens more than `max_rows` sequences of `max_len` can use. Raises
    `ConfigurationError`, with the numbers, if not even one block fits, or if preallocate_kv_cache would take more than
    is free.
    """
    block_bytes = bytes_per_token * config.block_size
    if config.kv_cache_tokens is not None:
        requested = -(-config.kv_cache_tokens // config.block_size)
    else:
        requested = min(_budget(config, int(free_bytes * share)) // block_bytes, _useful(config, max_len, max_rows))
    size = _cache_size(config, _setting(config), requested, block_bytes, free_bytes)
    if size.blocks < 1:
        raise ConfigurationError(_explain(config, bytes_per_token, free_bytes))
    return size


def num_host_blocks(config: EngineConfig, bytes_per_token: int, free_bytes: int) -> CacheSize:
    """Number of blocks that `swap_space` holds, within 90% of the host's `free_bytes`; 0 without a tier.

    Raises `ConfigurationError` as `num_blocks` does, and if swap_space is set and not even one block fits.
    """
    block_bytes = bytes_per_token * config.block_size
    size = _cache_size(
        config, "swap_space", int(config.swap_space * GIB) // block_bytes, block_bytes, max(0, free_bytes)
    )
    if config.swap_space and size.blocks < 1:
        raise ConfigurationError(
            f"swap_space={config.swap_space} GiB has no room for a single block of {block_bytes} bytes, with "
            f"{free_bytes} bytes free on the host: raise it, lower memory_pool_size, or leave it out"
        )
    return size


def _cache_size(config: EngineConfig, setting: str, requested: int, block_bytes: int, free_bytes: int) -> CacheSize:
    blocks = min(requested, int(free_bytes * MAX_FREE_SHARE) // block_bytes)
    figures = (
        f"{setting}={getattr(config, setting)} is {requested * block_bytes / MIB:.1f} MiB, but only "
        f"{blocks * block_bytes / MIB:.1f} MiB of {free_bytes / MIB:.1f} MiB free memory can be used"
    )
    if config.preallocate_kv_cache and requested * block_bytes > free_bytes:
        raise ConfigurationError(f"{figures}: lower it, free memory, or leave preallocate_kv_cache out")
    tokens = blocks * config.block_size
    return CacheSize(blocks, requested, f"{figures}: it is cut to {tokens} tokens" if blocks < requested else "")


def _setting(config: EngineConfig) -> str:
    """The setting that takes precedence."""
    for name in ("kv_cache_tokens", "gpu_memory_utilization"):
        if getattr(config, name) is not None:
            return name
    return "memory_pool_size"


def _budget(config: EngineConfig, free_bytes: int) -> int:
    if config.gpu_memory_utilization is not None:
        return int(free_bytes * config.gpu_memory_utilization)
    return free_bytes if config.memory_pool_size is None else config.memory_pool_size


def _useful(config: EngineConfig, max_len: int, max_rows: int) -> int:
    return max_rows * -(-max_len // config.block_size) + 1


def _explain(config: EngineConfig, bytes_per_token: int, free_bytes: int) -> str:
    rows = (
        ("bytes per token", bytes_per_token),
        ("block_size", config.block_size),
        ("bytes per block", bytes_per_token * config.block_size),
        ("free bytes", free_bytes),
        ("of which usable", int(free_bytes * MAX_FREE_SHARE)),
        ("kv_cache_tokens", config.kv_cache_tokens),
        ("gpu_memory_utilization", config.gpu_memory_utilization),
        ("memory_pool_size", config.memory_pool_size),
    )
    table = "\n".join(f"  {name:<24}{value!s:>16}" for name, value in rows)
    return f"the K/V cache has no room for a single block: give it more memory or use a smaller block_size\n{table}"

"""How many blocks the K/V cache and its tier on the host get: pure arithmetic from settings and free memory.

Owns the order of precedence of the settings, the limits, and the words for a cache that is smaller than was asked for.
Never asks a device anything. Called once, at load.
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.config import GIB, EngineConfig
from penstock.errors import ConfigurationError

# The rest stays for activations, logits and whoever else allocates.
MOST_OF_FREE = 0.9
MIB = 1024**2


class Room(NamedTuple):
    """How many blocks there is room for, and how many were `wanted`; `warning` says why fewer, if they are fewer."""

    blocks: int
    wanted: int
    warning: str = ""


def num_blocks(
    config: EngineConfig, bytes_per_token: int, free_bytes: int, max_len: int, max_rows: int, *, share: float = 1.0
) -> Room:
    """Number of K/V blocks, at least one.

    `bytes_per_token` counts K and V of all layers; `free_bytes` is what the device has free; `max_len` is the most
    tokens of one sequence, `max_rows` the most sequences that may ever run; `share` is what gpu_memory_utilization is a
    fraction of (a quarter of a CPU's free memory, which belongs to others too). The settings count in the order
    kv_cache_tokens, gpu_memory_utilization, memory_pool_size; none of them takes more than 90% of `free_bytes`, and
    only kv_cache_tokens more than `max_rows` of the longest sequences can use. Raises `ConfigurationError`, with
    the numbers, when not even one block fits, and when preallocate_kv_cache would take more than is free.
    """
    block_bytes = bytes_per_token * config.block_size
    if config.kv_cache_tokens is not None:
        wanted = -(-config.kv_cache_tokens // config.block_size)
    else:
        wanted = min(_budget(config, int(free_bytes * share)) // block_bytes, _useful(config, max_len, max_rows))
    room = _room(config, _setting(config), wanted, block_bytes, free_bytes)
    if room.blocks < 1:
        raise ConfigurationError(_explain(config, bytes_per_token, free_bytes))
    return room


def num_host_blocks(config: EngineConfig, bytes_per_token: int, free_bytes: int) -> Room:
    """Number of blocks that `swap_space` holds, within 90% of the host's `free_bytes`; 0 if there is to be no tier.

    Raises `ConfigurationError`, with the numbers, when there is to be one and not even one block fits, and as above.
    """
    block_bytes = bytes_per_token * config.block_size
    room = _room(config, "swap_space", int(config.swap_space * GIB) // block_bytes, block_bytes, max(0, free_bytes))
    if config.swap_space and room.blocks < 1:
        raise ConfigurationError(
            f"swap_space={config.swap_space} GiB has no room for a single block of {block_bytes} bytes, with "
            f"{free_bytes} bytes free on the host: raise it, lower memory_pool_size, or leave it out"
        )
    return room


def _room(config: EngineConfig, setting: str, wanted: int, block_bytes: int, free_bytes: int) -> Room:
    blocks = min(wanted, int(free_bytes * MOST_OF_FREE) // block_bytes)
    figures = (
        f"{setting}={getattr(config, setting)} comes to {wanted * block_bytes / MIB:.1f} MiB, and of "
        f"{free_bytes / MIB:.1f} MiB that are free {blocks * block_bytes / MIB:.1f} MiB can be taken"
    )
    if config.preallocate_kv_cache and wanted * block_bytes > free_bytes:
        raise ConfigurationError(f"{figures}: lower it, free memory, or leave preallocate_kv_cache out")
    tokens = blocks * config.block_size
    return Room(blocks, wanted, f"{figures}: it is cut to {tokens} tokens" if blocks < wanted else "")


def _setting(config: EngineConfig) -> str:
    """Which of the settings counts."""
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
        ("of which usable", int(free_bytes * MOST_OF_FREE)),
        ("kv_cache_tokens", config.kv_cache_tokens),
        ("gpu_memory_utilization", config.gpu_memory_utilization),
        ("memory_pool_size", config.memory_pool_size),
    )
    table = "\n".join(f"  {name:<24}{value!s:>16}" for name, value in rows)
    return f"the K/V cache has no room for a single block: give it more memory or use a smaller block_size\n{table}"

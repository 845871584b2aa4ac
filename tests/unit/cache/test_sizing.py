"""Number of blocks from settings and memory, by hand: 100 bytes per token, blocks of 10 tokens, 1,000 bytes each."""

from __future__ import annotations

import pytest

from penstock.cache.sizing import num_blocks, num_host_blocks
from penstock.config import EngineConfig
from penstock.errors import ConfigurationError


def blocks(free_bytes: int = 10**9, max_len: int = 10**6, max_rows: int = 32, **settings: object) -> int:
    return num_blocks(EngineConfig(block_size=10, **settings), 100, free_bytes, max_len, max_rows).blocks


def test_tokens_go_before_fraction_and_fraction_before_bytes() -> None:
    assert blocks(memory_pool_size=7999) == 7
    assert blocks(free_bytes=100_000, memory_pool_size=7999, gpu_memory_utilization=0.5) == 50
    assert blocks(memory_pool_size=7999, gpu_memory_utilization=0.5, kv_cache_tokens=31) == 4


def test_without_any_setting_it_takes_what_may_be_taken() -> None:
    assert blocks(free_bytes=100_000, memory_pool_size=None) == 90


def test_a_tenth_of_free_memory_stays() -> None:
    assert blocks(free_bytes=10_000, memory_pool_size=10**8) == 9
    assert blocks(free_bytes=10_000, gpu_memory_utilization=1.0) == 9
    assert blocks(free_bytes=10_000, kv_cache_tokens=10**6) == 9


def test_no_more_than_a_full_batch_can_use_and_one() -> None:
    assert blocks(memory_pool_size=10**8, max_rows=2, max_len=25) == 2 * 3 + 1
    assert blocks(kv_cache_tokens=1000, max_rows=2, max_len=25) == 100


def test_a_single_block_is_enough() -> None:
    assert blocks(free_bytes=1112) == 1


def test_too_little_for_one_block_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ConfigurationError) as caught:
        blocks(free_bytes=1111)
    for number in ("1000", "1111", "999", str(1024**3)):
        assert number in str(caught.value)


def host_blocks(gib: float, free_bytes: int = 10**9) -> int:
    return num_host_blocks(EngineConfig(block_size=10, swap_space=gib), 100, free_bytes).blocks


def test_swap_space_is_gib_within_what_is_free() -> None:
    assert host_blocks(0) == 0
    assert host_blocks(2**-20) == 1
    assert host_blocks(2**-10) == 1048
    assert host_blocks(2**-10, free_bytes=10_000) == 9
    assert host_blocks(0, free_bytes=-5) == 0


def test_swap_space_without_room_for_a_block_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ConfigurationError, match=r"swap_space=1e-07 GiB has no room for a single block of 1000 bytes"):
        host_blocks(1e-7)
    with pytest.raises(ConfigurationError, match="1111 bytes free on the host"):
        host_blocks(4, free_bytes=1111)


def test_a_cache_that_is_cut_says_so_with_the_figures() -> None:
    """It was cut without a word."""
    config = EngineConfig(block_size=10, memory_pool_size=3 * 2**30)
    room = num_blocks(config, 100, 2**30, 10**7, 32)
    assert (room.blocks, room.requested) == (966367, 3221225)
    assert room.warning == (
        "memory_pool_size=3221225472 is 3072.0 MiB, but only 921.6 MiB of 1024.0 MiB free memory can be used: "
        "it is cut to 9663670 tokens"
    )
    swap = num_host_blocks(EngineConfig(block_size=10, swap_space=2), 100, 2**30)
    assert swap.warning.startswith("swap_space=2.0 is 2048.0 MiB")
    assert num_blocks(EngineConfig(block_size=10, kv_cache_tokens=10**8), 100, 2**30, 9, 9).warning.startswith(
        "kv_cache_tokens=1"
    )
    assert not num_blocks(config, 100, 2**40, 10**7, 32).warning
    assert not num_blocks(config, 100, 2**30, 10, 32).warning, "no batch can use more"


def test_memory_that_is_not_free_is_not_preallocated() -> None:
    """Minutes went into touching it."""
    config = EngineConfig(block_size=10, memory_pool_size=3 * 2**30, swap_space=3, preallocate_kv_cache=True)
    with pytest.raises(
        ConfigurationError, match=r"memory_pool_size=.* 3072.0 MiB, .* of 1024.0 MiB .* leave preallocate"
    ):
        num_blocks(config, 100, 2**30, 10**7, 32)
    with pytest.raises(ConfigurationError, match=r"swap_space=3.0 is 3072.0 MiB"):
        num_host_blocks(config, 100, 2**30)
    assert num_blocks(config, 100, 4 * 2**30, 10**7, 32).blocks == 3221225

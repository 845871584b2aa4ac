"""Memory that is used again: whose it is, how much is kept, and that nothing about its content is promised."""

from __future__ import annotations

import random

import pytest
import torch

from penstock.errors import ConfigurationError, RequestError
from penstock.optimizers.rewrites.memory_pool import MemoryPool

KIB = 1024


def test_returned_memory_serves_any_shape_and_dtype() -> None:
    """an earlier pool found memory by its bytes alone and gave it out with the dtype that it had before."""
    pool = MemoryPool(64 * KIB)
    first = pool.get_tensor((8, 16), torch.float32)
    address = first.data_ptr()
    pool.return_tensor(first)
    for shape, dtype in (((4, 16), torch.int64), ((256,), torch.bfloat16), ((2, 2, 128), torch.int8), ((), torch.bool)):
        tensor = pool.get_tensor(shape, dtype)
        assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == (torch.Size(shape), dtype, address)
        assert tensor.is_contiguous()
        pool.return_tensor(tensor)
    assert (pool.stats()["num_new"], pool.stats()["num_reused"]) == (1, 4)


def test_bytes_count_by_the_size_of_the_dtype() -> None:
    """there, an int64 was counted as 4 bytes."""
    pool = MemoryPool(64 * KIB)
    pool.get_tensor((1024,), torch.int64)
    assert pool.stats()["lent_bytes"] == 8 * KIB


def test_content_is_whatever_was_there() -> None:
    """nobody may count on zeros; who needs them writes them."""
    pool = MemoryPool(64 * KIB)
    tensor = pool.get_tensor((128,))
    tensor.fill_(7.0)
    pool.return_tensor(tensor)
    assert pool.get_tensor((64,)).eq(7.0).all()


def test_memory_in_use_is_given_to_nobody_else() -> None:
    pool = MemoryPool(64 * KIB)
    tensors = [pool.get_tensor((64,)).fill_(i) for i in range(5)]
    assert [int(tensor[0]) for tensor in tensors] == [0, 1, 2, 3, 4]
    pool.return_all()
    assert (pool.stats()["lent_bytes"], pool.stats()["free_bytes"]) == (0, 5 * 512)


def test_a_tensor_larger_than_the_pool_is_served_and_not_kept() -> None:
    """an earlier engine looped for ever, evicting from an empty store."""
    pool = MemoryPool(4 * KIB)
    small, large = pool.get_tensor((128,)), pool.get_tensor((4 * KIB + 1,), torch.uint8)
    assert large.numel() == 4 * KIB + 1
    pool.return_tensor(large)
    pool.return_tensor(small)
    assert pool.stats()["free_bytes"] == 512
    assert MemoryPool(0).get_tensor((5, 5)).shape == (5, 5)


def test_the_memory_returned_longest_ago_makes_room() -> None:
    pool = MemoryPool(2 * KIB)
    old, new, large = (pool.get_tensor((size,), torch.uint8) for size in (512, 512, 1536))
    address = new.data_ptr()
    for tensor in (old, new, large):
        pool.return_tensor(tensor)
    assert pool.stats() | {"num_new": 3, "num_dropped": 1, "free_bytes": 2048} == pool.stats()
    assert pool.get_tensor((512,), torch.uint8).data_ptr() == address


def test_growing_needs_leave_nothing_behind() -> None:
    """As the logits of a batch that grows by a row at a time."""
    pool = MemoryPool(64 * KIB * KIB)
    for rows in range(1, 33):
        pool.get_tensor((rows, 151_936))
        pool.return_all()
    stats = pool.stats()
    assert stats["free_bytes"] <= 32 * 151_936 * 4 * 1.25
    assert stats["num_new"] <= 19
    for rows in range(1, 33):
        pool.get_tensor((rows, 151_936))
        pool.return_all()
    assert pool.stats()["num_new"] == stats["num_new"]


def test_cleared_memory_is_gone_and_lent_memory_stays() -> None:
    pool = MemoryPool(64 * KIB)
    kept, given = pool.get_tensor((256,)).fill_(3.0), pool.get_tensor((1024,))
    pool.return_tensor(given)
    assert pool.clear_pool() == 4 * KIB
    assert pool.clear_pool() == 0
    assert kept.eq(3.0).all()
    pool.return_tensor(kept)
    assert pool.stats()["free_bytes"] == KIB


def test_what_is_not_lent_cannot_be_returned() -> None:
    pool = MemoryPool(64 * KIB)
    tensor = pool.get_tensor((4,))
    pool.return_tensor(tensor[1:3].view(torch.int32))
    for foreign in (tensor, torch.zeros(4), MemoryPool(64 * KIB).get_tensor((4,))):
        with pytest.raises(RequestError, match="not lent by this pool"):
            pool.return_tensor(foreign)
    with pytest.raises(ConfigurationError, match="pool_size=-1"):
        MemoryPool(-1)


def test_large_memory_is_reused_too() -> None:
    pool = MemoryPool(16 * KIB * KIB)
    address = pool.get_tensor((1024, 1024)).data_ptr()
    pool.return_all()
    assert pool.get_tensor((1000, 1000)).fill_(1.0).data_ptr() == address


@pytest.mark.parametrize("seed", range(5))
def test_books_are_kept_under_random_traffic(seed: int) -> None:
    rng, pool = random.Random(seed), MemoryPool(32 * KIB)
    lent: list[tuple[torch.Tensor, int]] = []
    for stamp in range(400):
        if lent and rng.random() < 0.5:
            tensor, value = lent.pop(rng.randrange(len(lent)))
            assert tensor.eq(value).all(), "somebody else wrote there"
            pool.return_tensor(tensor)
        else:
            value = stamp % 120
            lent.append((pool.get_tensor((rng.randint(1, 12), rng.randint(0, 900)), torch.int32).fill_(value), value))
        stats = pool.stats()
        assert 0 <= stats["free_bytes"] <= 32 * KIB
        assert stats["lent_bytes"] >= sum(tensor.nbytes for tensor, _ in lent)

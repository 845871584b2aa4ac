"""Both storages of K/V: blocks that move to the host and back keep their content, and which pages are released."""

from __future__ import annotations

import mmap
import sys
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.errors import OutOfMemory
from penstock.kernels.native import Kernels, available
from penstock.kernels.paged import attend
from penstock.models.attention import KVStorage
from penstock.models.panels import PanelStorage, metadata_of
from penstock.models.storage import (
    LayerShape,
    contiguous_runs,
    copy_rows,
    release_memory,
    release_rows,
    restore_memory,
)
from penstock.models.torch_attention import SlotStorage
from penstock.sampling import SamplingParams
from penstock.step import Row

CPU = torch.device("cpu")
SHAPE = LayerShape(2, 8, 8, torch.float32)
Case = tuple[KVStorage, Callable[[Tensor], Tensor]]  # a storage, and what its second layer holds at some slots

needs_kernels = pytest.mark.skipif(not available(), reason="no compiler")


@pytest.fixture(
    params=[
        ("plain", 4),
        pytest.param(("panels", 4), marks=needs_kernels),
        pytest.param(("panels", 32), marks=needs_kernels),
        pytest.param(("int8 panels", 16), marks=needs_kernels),
    ],
    ids=lambda param: f"{param[0]}, blocks of {param[1]}",
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """6 blocks and a tier of 3; blocks 0 and 1 of the second layer are filled at random."""
    kind, block_size = request.param
    length = 2 * block_size
    stored = torch.randn(2, length, SHAPE.heads, SHAPE.key_dim, generator=torch.Generator().manual_seed(0))
    if kind == "plain":
        plain = SlotStorage([SHAPE] * 2, 6, block_size, CPU, 3)
        for cache, values in zip((plain.keys[1], plain.values[1]), stored, strict=True):
            cache[:length] = values
        yield plain, lambda slots: torch.stack([cache[slots] for cache in (plain.keys[1], plain.values[1])])
        return
    kernels = Kernels(1)
    panels = PanelStorage(kernels, [SHAPE] * 2, 6, block_size, kind.startswith("int8"), 3)
    row = Row(0, [0] * length, 0, length, array("i", [0, 1]), True, SamplingParams(), length)
    values = stored.bfloat16() if kind.startswith("int8") else stored
    out = torch.empty_like(values[0])
    attend(kernels, panels.caches[1], metadata_of([row], block_size, np.arange(length)), out, *values, out, scaling=1.0)
    yield panels, lambda slots: torch.stack(panels.caches[1].read(slots))
    kernels.close()


def slots_of(storage: KVStorage, *blocks: int) -> Tensor:
    size = storage.block_size
    return torch.cat([torch.arange(size) + block * size for block in blocks])


def test_blocks_come_back_as_they_went_in_any_block(case: Case) -> None:
    storage, read = case
    before = read(slots_of(storage, 0, 1))
    assert before.ne(0).any()
    storage.swap([(1, 0), (0, 2)], [])
    storage.swap([], [(0, 5), (2, 3)])
    assert torch.equal(read(slots_of(storage, 3, 5)), before)
    assert read(slots_of(storage, 2, 4)).eq(0).all()


def test_in_one_step_blocks_leave_before_others_come_in_their_place(case: Case) -> None:
    storage, read = case
    block_0, block_1 = read(slots_of(storage, 0)), read(slots_of(storage, 1))
    storage.swap([(0, 1)], [])
    storage.swap([(1, 0)], [(1, 1), (0, 2)])
    assert torch.equal(read(slots_of(storage, 1)), block_0)
    assert torch.equal(read(slots_of(storage, 2)), block_1)


def test_only_the_named_blocks_are_released(case: Case) -> None:
    storage, read = case
    before = read(slots_of(storage, 0, 1))
    storage.swap([(0, 0), (1, 1)], [])
    storage.release([2, 3, 4, 5], [2])
    storage.swap([], [(0, 2), (1, 3)])
    assert torch.equal(read(slots_of(storage, 0, 1, 2, 3)), torch.cat([before, before], dim=1))


def test_a_tier_without_places_moves_nothing(case: Case) -> None:
    storage, read = case
    before = read(slots_of(storage, 0, 1))
    storage.swap([], [])
    storage.release([], [])
    assert torch.equal(read(slots_of(storage, 0, 1)), before)


def test_preallocated_memory_is_not_released() -> None:
    if not available():
        pytest.skip("no compiler")
    kernels = Kernels(1)
    storage = PanelStorage(kernels, [LayerShape(2, 128, 128, torch.float32)], 4, 16, int8=False)
    storage.touch(lambda: 1 << 40)
    storage.caches[0].panels.fill_(1)
    storage.release([0, 1, 2, 3], [])
    assert storage.caches[0].panels.eq(1).all()
    kernels.close()


def test_memory_that_is_no_longer_free_is_not_touched() -> None:
    """To touch it anyway may end the process."""
    if not available():
        pytest.skip("no compiler")
    kernels = Kernels(1)
    storage = PanelStorage(kernels, [LayerShape(2, 128, 128, torch.float32)] * 2, 4, 16, int8=False)
    free = iter([1 << 40, 1000])
    with pytest.raises(OutOfMemory, match=r"touched 1 of 2 layers .* and 1000 bytes are free; lower memory_pool_size"):
        storage.touch(lambda: next(free))
    kernels.close()


def test_neighbours_are_moved_together() -> None:
    assert contiguous_runs([]) == []
    assert contiguous_runs([(5, 1), (3, 8), (4, 9), (9, 2), (10, 4)]) == [(3, 8, 2), (5, 1, 1), (9, 2, 1), (10, 4, 1)]


def test_rows_are_copied_to_their_targets() -> None:
    source, target = torch.arange(10).view(5, 2), torch.zeros(4, 2, dtype=torch.int64)
    copy_rows(source, target, contiguous_runs([(4, 0), (1, 2), (2, 3)]))
    assert target.tolist() == [[8, 9], [0, 0], [2, 3], [4, 5]]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their pages")
def test_released_pages_read_as_zeros_and_others_are_unchanged() -> None:
    """Rows of half a page: of rows 1 to 4, only rows 2 and 3 fill a whole page."""
    region = mmap.mmap(-1, 8 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rows = torch.frombuffer(region, dtype=torch.uint8).view(16, -1)
    rows.fill_(7)
    release_rows(rows, 1, 5)
    assert [int(row.sum()) == 0 for row in rows[:6]] == [False, False, True, True, False, False]
    release_rows(rows, 3, 3)
    assert rows[4:].eq(7).all()


def test_a_tensor_on_a_device_gives_its_storage_back_and_takes_it_again() -> None:
    tensor = torch.empty(64, 64, device="meta")
    release_memory(tensor)
    assert tensor.untyped_storage().nbytes() == 0
    for _ in range(2):
        restore_memory(tensor)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="pages are returned on Linux")
def test_a_tensor_of_the_host_gives_its_pages_back_and_keeps_its_address() -> None:
    tensor = torch.full((1024, 1024), 1.0)
    address = tensor.data_ptr()
    release_memory(tensor)
    assert tensor.sum() < 4096  # whole pages read as zeros
    restore_memory(tensor)
    assert tensor.data_ptr() == address

"""Which rows the kernels compute together, and where their contexts are."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from penstock.errors import ConfigurationError, OutOfMemory
from penstock.kernels.native import Kernels, available
from penstock.kernels.paged import AttentionMetadata, attend
from penstock.models.panels import PanelStorage, metadata_of, supports
from penstock.models.storage import LayerShape
from penstock.sampling import SamplingParams
from penstock.step import Row

SHAPE = LayerShape(2, 8, 8, torch.float32)


def row(start: int, end: int, blocks: list[int]) -> Row:
    return Row(0, [0] * end, start, end, array("i", blocks), True, SamplingParams(), end)


def arrays(rows: list[Row], block_size: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The arguments of `AttentionMetadata`."""
    arrays_by_name: dict[str, list[int]] = {}

    def note(self: AttentionMetadata, by_panel: bool, slots: np.ndarray, **named_arrays: np.ndarray) -> None:
        arrays_by_name.update({name: list(map(int, values)) for name, values in named_arrays.items()})

    monkeypatch.setattr(AttentionMetadata, "__init__", note)
    metadata_of(rows, block_size, np.zeros(sum(r.num_tokens for r in rows), dtype=np.int64))
    return arrays_by_name


def tasks(arrays_by_name: dict[str, list[int]]) -> list[tuple[int, ...]]:
    """(first row, rows, begin, end, shared) of each."""
    return list(
        zip(
            *(arrays_by_name[name] for name in ("task_row", "task_rows", "task_begin", "task_end", "task_shared")),
            strict=True,
        )
    )


def test_a_prompt_is_cut_into_tasks_the_last_tokens_first(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays_by_name = arrays([row(10, 110, list(range(7)))], 16, monkeypatch)
    assert tasks(arrays_by_name) == [(0, 1, 52, 100, 0), (0, 1, 4, 52, 0), (0, 1, 0, 4, 0)]
    assert arrays_by_name["tables"] == [0, 1, 2, 3, 4, 5, 6]
    assert (arrays_by_name["first_token"], arrays_by_name["first_position"]) == ([0], [10])


def test_rows_with_the_same_first_blocks_share_whole_tiles_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are 64 keys, four blocks of 16: rows 0 and 2 have nine blocks in common, two tiles."""
    common = list(range(20, 29))
    rows = [row(150, 151, [*common, 1]), row(80, 81, list(range(6))), row(149, 150, [*common, 2])]
    arrays_by_name = arrays(rows, 16, monkeypatch)
    assert tasks(arrays_by_name) == [(0, 2, 0, 1, 128), (2, 1, 0, 1, 0)]
    assert arrays_by_name["first_token"] == [0, 2, 1]
    assert arrays_by_name["first_position"] == [150, 149, 80]
    assert arrays_by_name["tables"] == [*common, 1, *common, 2, *range(6)]


def test_keys_that_a_row_writes_in_the_step_are_never_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """At position 127 the second tile is not complete before the step."""
    blocks = list(range(8))
    assert tasks(arrays([row(127, 128, blocks)] * 2, 16, monkeypatch)) == [(0, 2, 0, 1, 64)]
    assert tasks(arrays([row(63, 64, blocks)] * 2, 16, monkeypatch)) == [(0, 1, 0, 1, 0), (1, 1, 0, 1, 0)]


def test_large_blocks_are_several_panels_and_small_ones_are_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrays([row(39, 40, [3, 1])], 32, monkeypatch)["tables"] == [6, 7, 2]
    assert arrays([row(5, 6, [3, 1])], 4, monkeypatch)["tables"] == [12, 13, 14, 15, 4, 5]


def test_kernels_hold_even_heads_of_known_formats() -> None:
    assert supports([SHAPE])
    assert not supports([SHAPE, LayerShape(2, 7, 8, torch.float32)])
    assert not supports([LayerShape(2, 8, 520, torch.float32)])
    assert not supports([LayerShape(2, 8, 8, torch.float64)])


@pytest.mark.skipif(not available(), reason="no compiler")
def test_a_cache_of_panels_is_refused_with_what_to_change() -> None:
    kernels = Kernels(1)
    with pytest.raises(ConfigurationError, match="block_size that is a multiple of 16"):
        PanelStorage(kernels, [SHAPE], 4, 8, int8=True)
    with pytest.raises(OutOfMemory, match="lower memory_pool_size"):
        PanelStorage(kernels, [SHAPE], 1 << 42, 16, int8=False)
    kernels.close()


@pytest.mark.skipif(not available(), reason="no compiler")
@pytest.mark.parametrize("block_size", [4, 16, 32])
def test_copied_blocks_hold_what_their_sources_held(block_size: int) -> None:
    kernels, length = Kernels(1), 2 * block_size
    storage = PanelStorage(kernels, [SHAPE] * 2, 6, block_size, int8=False)
    steps = metadata_of([row(0, length, [0, 1])], block_size, np.arange(length))
    stored = torch.randn(2, length, SHAPE.heads, SHAPE.key_dim)
    out = torch.empty_like(stored[0])
    attend(kernels, storage.caches[1], steps, out, stored[0], stored[1], out, scaling=1.0)
    storage.copy_blocks([])
    storage.copy_blocks([(0, 3), (1, 5)])
    copied = torch.cat([torch.arange(block_size) + block * block_size for block in (3, 5)])
    assert torch.equal(torch.stack(storage.caches[1].read(copied)), stored)
    assert torch.stack(storage.caches[0].read(copied)).eq(0).all()
    assert torch.stack(storage.caches[1].read(torch.arange(block_size) + 2 * block_size)).eq(0).all()
    kernels.close()

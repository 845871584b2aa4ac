"""Cache blocks as rows of memory: which are copied together, and which pages go back to the system."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from penstock.models.blocks import copy_rows, give_back, runs


def test_neighbours_are_moved_together() -> None:
    assert runs([]) == []
    assert runs([(5, 1), (3, 8), (4, 9), (9, 2), (10, 4)]) == [(3, 8, 2), (5, 1, 1), (9, 2, 1), (10, 4, 1)]


def test_rows_go_where_they_are_told() -> None:
    source, target = torch.arange(10).view(5, 2), torch.zeros(4, 2, dtype=torch.int64)
    copy_rows(source, target, runs([(4, 0), (1, 2), (2, 3)]))
    assert target.tolist() == [[8, 9], [0, 0], [2, 3], [4, 5]]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their pages")
def test_pages_given_back_read_as_zeros_and_others_are_left_alone() -> None:
    """Rows of half a page: of rows 1 to 4 only the page that 2 and 3 fill is wholly unused."""
    region = mmap.mmap(-1, 8 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rows = torch.frombuffer(region, dtype=torch.uint8).view(16, -1)
    rows.fill_(7)
    give_back(rows, 1, 5)
    assert [int(row.sum()) == 0 for row in rows[:6]] == [False, False, True, True, False, False]
    give_back(rows, 3, 3)
    assert rows[4:].eq(7).all()

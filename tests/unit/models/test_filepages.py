"""Pages of weight files are given back when nothing was written into them; what they held can be read again."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from penstock.models.filepages import release_file_pages

SIZE = 64 * mmap.PAGESIZE
SMAPS = Path("/proc/self/smaps")

pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="the system does not list mappings")


def mapped(path: Path) -> mmap.mmap:
    """A private mapping of a new file, every page of it read."""
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file:
        region = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY)
    assert sum(region[:: mmap.PAGESIZE]) == 0
    return region


def resident(path: Path) -> int:
    """Bytes of a mapping that are in memory."""
    lines = iter(SMAPS.read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(other.split()[1]) * 1024 for other in lines if other.startswith("Rss:"))
    raise AssertionError("not mapped")


def view_of(region: mmap.mmap) -> torch.Tensor:
    """A tensor somewhere in a mapping."""
    return torch.frombuffer(region, dtype=torch.uint8, count=8, offset=7 * mmap.PAGESIZE)


def test_pages_that_were_only_read_are_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    region = mapped(path)
    assert resident(path) == SIZE
    release_file_pages([view_of(region), torch.zeros(3)])
    assert resident(path) == 0
    assert region[:256] == bytes(range(256))


def test_a_mapping_that_was_written_to_keeps_what_was_written(tmp_path: Path) -> None:
    region = mapped(tmp_path / "model.safetensors")
    region[5 * mmap.PAGESIZE] = 77
    release_file_pages([view_of(region)])
    assert region[5 * mmap.PAGESIZE] == 77


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    region = mapped(path)
    release_file_pages([view_of(region)])
    assert resident(path) == SIZE


def test_mappings_of_other_loads_are_left_alone(tmp_path: Path) -> None:
    """Another thread unmaps its weights at any moment: what took their addresses lost its contents."""
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    region, others = mapped(path), mapped(other)
    release_file_pages([view_of(region)])
    assert (resident(path), resident(other)) == (0, SIZE)
    others.close()

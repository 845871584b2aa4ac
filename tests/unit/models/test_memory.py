"""How much memory a container leaves, and pages of weight files that are given back."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from penstock.models.memory import container_memory, release_file_pages

GIB = 2**30


def group(folder: Path, limit: str, used: int, files: int = 0, *, version: int = 2) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 17\ninactive_file {files}\nactive_file 0\n")


def own(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "cgroup"
    file.write_text(text)
    return file


def test_pages_of_files_count_as_free(tmp_path: Path) -> None:
    """Weight files that were read count as used memory of a container, and the K/V cache did not fit."""
    group(tmp_path, str(4 * GIB), 3 * GIB, files=2 * GIB)
    assert container_memory(tmp_path, own(tmp_path, "0::/\n")) == (4 * GIB, 3 * GIB)


def test_the_tightest_of_the_groups_around_counts(tmp_path: Path) -> None:
    """Only the innermost group of a container was read."""
    group(tmp_path / "slice", str(2 * GIB), GIB)
    group(tmp_path / "slice" / "job", "max", GIB)
    assert container_memory(tmp_path, own(tmp_path, "0::/slice/job\n")) == (2 * GIB, GIB)


@pytest.mark.parametrize("path", ["/", "/docker/4711"])
def test_groups_of_version_1(tmp_path: Path, path: str) -> None:
    group(tmp_path / "memory", str(2 * GIB), GIB, version=1)
    assert container_memory(tmp_path, own(tmp_path, f"5:cpu:/x\n4:memory:{path}\n0::/\n")) == (2 * GIB, GIB)


def test_no_limit_and_no_groups(tmp_path: Path) -> None:
    group(tmp_path / "memory", "9223372036854771712", GIB, version=1)
    assert container_memory(tmp_path, own(tmp_path, "4:memory:/\n")) is None
    assert container_memory(tmp_path / "none", tmp_path / "nothing") is None


SIZE = 64 * mmap.PAGESIZE
SMAPS = Path("/proc/self/smaps")

lists_mappings = pytest.mark.skipif(not SMAPS.exists(), reason="the system does not list mappings")


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


@lists_mappings
def test_pages_that_were_only_read_are_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    region = mapped(path)
    assert resident(path) == SIZE
    release_file_pages([view_of(region), torch.zeros(3)])
    assert resident(path) == 0
    assert region[:256] == bytes(range(256))


@lists_mappings
def test_a_mapping_that_was_written_to_keeps_what_was_written(tmp_path: Path) -> None:
    region = mapped(tmp_path / "model.safetensors")
    region[5 * mmap.PAGESIZE] = 77
    release_file_pages([view_of(region)])
    assert region[5 * mmap.PAGESIZE] == 77


@lists_mappings
def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    region = mapped(path)
    release_file_pages([view_of(region)])
    assert resident(path) == SIZE


@lists_mappings
def test_mappings_of_other_loads_are_left_alone(tmp_path: Path) -> None:
    """Another thread may unmap its weights at any moment: new memory at their addresses lost its contents."""
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    region, other_region = mapped(path), mapped(other)
    release_file_pages([view_of(region)])
    assert (resident(path), resident(other)) == (0, SIZE)
    other_region.close()

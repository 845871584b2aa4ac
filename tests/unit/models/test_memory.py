"""How much memory a container leaves to this process, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.models.memory import container_memory

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
    """Weights that were read fill a container's account, and the K/V cache found no room."""
    group(tmp_path, str(4 * GIB), 3 * GIB, files=2 * GIB)
    assert container_memory(tmp_path, own(tmp_path, "0::/\n")) == (4 * GIB, 3 * GIB)


def test_the_tightest_of_the_groups_around_counts(tmp_path: Path) -> None:
    """Only the innermost group of a container was looked at, where it had its own name for it."""
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

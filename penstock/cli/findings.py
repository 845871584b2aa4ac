"""What a doctor's report says is wrong, and what to do about it: a pure function of the report.

Looks at no machine itself. Called by `doctor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

NEEDED = {"torch": (2, 6), "transformers": (5, 0)}
LITTLE_RAM_BYTES = 1 << 30
Report = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and its remedy. `broken`: the engine cannot work like this."""

    problem: str
    remedy: str
    broken: bool = False

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def find_problems(report: Report) -> list[Finding]:
    """Everything that stands out in a report; sections that are missing are skipped."""
    return [finding for look in (_versions, _hardware, _cache, _rates) for finding in look(report)]


def _versions(report: Report) -> Iterator[Finding]:
    found = report.get("versions", {})
    for name, needed in NEEDED.items():
        if found.get(name) and numbers(found[name]) < needed:
            want = ".".join(map(str, needed))
            yield Finding(f"{name} {found[name]} is too old", f"pip install '{name}>={want}'", broken=True)
    if found and not found.get("uvloop"):
        yield Finding("uvloop is not installed; the engine's loop is asyncio's own", "pip install 'penstock[uvloop]'")


def _hardware(report: Report) -> Iterator[Finding]:
    found = report.get("hardware", {})
    if found.get("nvidia_driver") and not found.get("cuda_devices"):
        have = "PyTorch is a CPU build" if not found.get("cuda_build") else "PyTorch cannot use it"
        yield Finding(
            f"there is an NVIDIA driver, but {have}", "install PyTorch as https://pytorch.org/get-started says"
        )
    if found.get("threads", 1) * 2 < found.get("cores", 1):
        yield Finding(
            f"PyTorch uses {found['threads']} of {found['cores']} cores",
            "unset OMP_NUM_THREADS, or set it to the cores",
        )
    if found.get("ram_free_bytes", LITTLE_RAM_BYTES) < LITTLE_RAM_BYTES:
        free = found["ram_free_bytes"] / 2**20
        yield Finding(
            f"only {free:.0f} MiB of memory are free", "end other programs, or lower memory_pool_size (bytes)"
        )


def _cache(report: Report) -> Iterator[Finding]:
    found = report.get("cache", {})
    if found and found["tokens"] < found["longest_sequence"]:
        yield Finding(
            f"the K/V cache holds {found['tokens']} tokens, a sequence may have {found['longest_sequence']}",
            "raise PENSTOCK_MEMORY_POOL_SIZE (bytes), or lower PENSTOCK_MAX_SEQUENCE_LENGTH",
        )


def _rates(report: Report) -> Iterator[Finding]:
    found, dtype = report.get("rates", {}), report.get("model", {}).get("dtype")
    own, plain = found.get("matmul_gflop_per_s"), found.get("matmul_float32_gflop_per_s")
    if own and plain and 2 * own < plain:
        yield Finding(
            f"{dtype} is slow on this machine: {own:.0f} GFLOP/s, float32 has {plain:.0f}", "use --dtype float32"
        )


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: "2.13.0+cpu" is (2, 13)."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])

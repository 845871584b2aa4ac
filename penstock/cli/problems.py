"""Problems in a doctor's report, each with a remedy: pure functions of the report.

Never looks at the machine itself. Called by `doctor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MIN_VERSIONS = {"torch": (2, 6), "transformers": (5, 0)}
MIN_RAM_BYTES = 1 << 30
Report = Mapping[str, Mapping[str, Any]]  # plain data by section


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its remedy. `is_fatal`: the engine cannot work like this."""

    description: str
    remedy: str
    is_fatal: bool = False

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        return {"problem": self.description, "remedy": self.remedy, "broken": self.is_fatal}


def find_problems(report: Report) -> list[Problem]:
    """All problems of a report; missing sections are skipped."""
    return [problem for check in (_versions, _hardware, _cache, _rates) for problem in check(report)]


def _versions(report: Report) -> Iterator[Problem]:
    versions = report.get("versions", {})
    for name, minimum in MIN_VERSIONS.items():
        if versions.get(name) and parsed(versions[name]) < minimum:
            requirement = f"{name}>={'.'.join(map(str, minimum))}"
            yield Problem(f"{name} {versions[name]} is too old", f"pip install '{requirement}'", is_fatal=True)
    if versions and not versions.get("uvloop"):
        yield Problem("uvloop is not installed; the engine uses asyncio's event loop", "pip install 'penstock[uvloop]'")


def _hardware(report: Report) -> Iterator[Problem]:
    hardware = report.get("hardware", {})
    if hardware.get("nvidia_driver") and not hardware.get("cuda_devices"):
        cause = "PyTorch cannot use it" if hardware.get("cuda_build") else "PyTorch is a CPU build"
        yield Problem(
            f"an NVIDIA driver is installed, but {cause}",
            "install PyTorch as described on https://pytorch.org/get-started",
        )
    if hardware.get("threads", 1) * 2 < hardware.get("cores", 1):
        yield Problem(
            f"PyTorch uses {hardware['threads']} of {hardware['cores']} cores",
            "unset OMP_NUM_THREADS, or set it to the number of cores",
        )
    if hardware.get("ram_free_bytes", MIN_RAM_BYTES) < MIN_RAM_BYTES:
        free_mib = hardware["ram_free_bytes"] / 2**20
        yield Problem(f"only {free_mib:.0f} MiB of memory are free", "close other programs, or lower memory_pool_size")


def _cache(report: Report) -> Iterator[Problem]:
    cache = report.get("cache", {})
    if cache and cache["tokens"] < cache["longest_sequence"]:
        yield Problem(
            f"the K/V cache holds {cache['tokens']} tokens, but a sequence may have {cache['longest_sequence']}",
            "raise PENSTOCK_MEMORY_POOL_SIZE (bytes), or lower PENSTOCK_MAX_SEQUENCE_LENGTH",
        )


def _rates(report: Report) -> Iterator[Problem]:
    rates, dtype = report.get("rates", {}), report.get("model", {}).get("dtype")
    rate, float32_rate = rates.get("matmul_gflop_per_s"), rates.get("matmul_float32_gflop_per_s")
    if rate and float32_rate and 2 * rate < float32_rate:
        yield Problem(
            f"{dtype} is slow on this machine: {rate:.0f} GFLOP/s, against {float32_rate:.0f} in float32",
            "use --dtype float32",
        )


def parsed(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: "2.13.0+cpu" is (2, 13)."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])

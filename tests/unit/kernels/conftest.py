"""`kernels`: a pool of one thread for every instruction set that this CPU has, so that no path stays untried."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.kernels.build import THIS_CPU, build
from penstock.kernels.native import Kernels, available

# Flags of the compiler, and what the CPU must have: sixteen, eight and four numbers at a time, with and without
# the instructions for bfloat16 and int8.
TARGETS = {
    "this CPU": (THIS_CPU, ""),
    "AVX-512": (("-march=skylake-avx512",), "avx512f avx512bw avx512cd avx512dq avx512vl fma"),
    "AVX-512 with emulated tiles": (
        ("-march=skylake-avx512", "-DEMULATED_TILES"),
        "avx512f avx512bw avx512cd avx512dq avx512vl fma",
    ),
    "AVX2": (("-march=haswell",), "avx2 fma f16c bmi1 bmi2 movbe"),
    "AVX2 and VNNI": (("-march=haswell", "-mavxvnni"), "avx2 fma f16c bmi1 bmi2 movbe avx_vnni"),
    "SSE2": (("-march=x86-64",), "sse2"),
}


def cpu_flags() -> set[str]:
    """What the system says this CPU can do; nothing where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def kernels_of(target: str) -> Kernels:
    """A pool of one thread, compiled for the target. Skips the test where that is impossible."""
    flags, needed = TARGETS[target]
    if not available() or not cpu_flags().issuperset(needed.split()):
        pytest.skip("no compiler, or a CPU without these instructions")
    return Kernels(1, build(flags).library)


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The kernels, compiled for the target."""
    made = kernels_of(request.param)
    yield made
    made.close()

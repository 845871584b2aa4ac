"""The user's own event loop goes on while the engine works: `benchmarks/event_loop_lag.py`, with bounds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

P99_MS, MAX_MS = 10.0, 50.0
QUIET_MS = 2.0  # p99 of an idle loop on a machine that has nothing else to do is a tenth of this
ATTEMPTS = 3


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script, as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "event_loop_lag.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["prefill", "stream", "tokenize"])
async def test_heartbeat_in_the_users_loop_is_never_late(benchmark: ModuleType, name: str) -> None:
    """Bounds that other programs' work breaks now and then, so the best of three attempts counts.

    Where even an idle loop wakes late, the machine is too busy to tell anything about the engine.
    """
    lags: list[dict[str, float]] = []
    noise_ms: list[float] = []
    async with benchmark.make_engine() as engine:
        for _ in range(ATTEMPTS):
            noise_ms.append((await lag_of(benchmark, engine, "idle"))["p99"])
            lags.append(await lag_of(benchmark, engine, name))
            if lags[-1]["p99"] <= P99_MS and lags[-1]["max"] <= MAX_MS:
                return
    if min(noise_ms) > QUIET_MS:
        pytest.skip(f"an idle loop wakes {min(noise_ms):.1f} ms late on this machine now")
    pytest.fail(f"lags {lags} ms; of an idle loop {noise_ms}")


async def lag_of(benchmark: ModuleType, engine: Any, name: str) -> dict[str, float]:
    """p50, p99 and max in milliseconds."""
    found: dict[str, float] = await benchmark.lag_ms(engine, benchmark.PHASES[name])
    return found

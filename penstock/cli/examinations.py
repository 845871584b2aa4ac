"""The examinations of `penstock doctor`: each fills one section of the report with plain data.

Times are seconds, sizes bytes. One that raises becomes a finding, and so do those that need its result. Never decides
what is good or bad (that is `findings`). Called by `doctor`.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from penstock import __version__
from penstock.cache.sizing import num_blocks
from penstock.cli.findings import Finding
from penstock.cli.session import alone, event_loop, loaded_engine, quiet_libraries, stream
from penstock.cli.terminal import one_line
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.engine.inference import InferenceEngine
from penstock.errors import PenstockError

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "uvloop")
MEASURE_S = 0.3
STREAMS, NEW_TOKENS = 16, 32
PROMPT = "def read_lines(path):\n"


def examine(config: EngineConfig) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """The report by section, and a finding for each examination that failed."""
    report: dict[str, dict[str, Any]] = {}
    failures: list[Finding] = []
    loaded: list[Any] = []
    for section, look in (
        ("versions", versions),
        ("imports", _imports),
        ("hardware", _hardware),
        ("model", lambda: alone(_model, config, loaded)),
        ("cache", lambda: _cache(config, loaded[0].runner)),
        ("rates", lambda: alone(_rates, loaded[0].runner.spec)),
        ("speed", lambda: _speed(config, loaded[0])),
    ):
        if section in ("cache", "rates", "speed") and not loaded:
            continue
        _attempt(section, look, report, failures)
    return report, failures


def _attempt(
    section: str, look: Callable[[], dict[str, Any]], report: dict[str, dict[str, Any]], failures: list[Finding]
) -> None:
    try:
        report[section] = look()
    except PenstockError as error:
        failures.append(
            Finding(f"{section}: {one_line(error)}", "change what the message names, then run this again", True)
        )
    except Exception as error:
        said = f"{section}: {type(error).__name__}: {one_line(error)}"
        failures.append(Finding(said, "reinstall: pip install --force-reinstall penstock torch transformers", True))


def versions() -> dict[str, Any]:
    """Of Penstock, Python and the libraries that matter; None where one is not installed."""
    return {"penstock": __version__, "python": platform.python_version()} | {name: _version(name) for name in LIBRARIES}


def _imports() -> dict[str, Any]:
    begin = time.perf_counter()
    quiet_libraries()
    from penstock.models import loading  # noqa: F401  (with it come torch and transformers)

    return {"import_s": time.perf_counter() - begin}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    from penstock.models.hardware import hardware

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
    } | hardware()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _model(config: EngineConfig, loaded: list[Any]) -> dict[str, Any]:
    """Loads the demo model, for the examinations after this one."""
    from penstock.models.loading import load

    begin = time.perf_counter()
    loaded.append(load(None, None, config))
    spec = loaded[0].runner.spec
    return {
        "default_model": str(MODEL_DIR),
        "load_s": time.perf_counter() - begin,
        "device": spec.device,
        "dtype": spec.dtype,
        "weight_bytes": spec.weight_bytes,
        "kernels": spec.kernels,
        "rewrites": ", ".join(spec.rewrites) or "none",
    }


def _cache(config: EngineConfig, runner: Any) -> dict[str, Any]:
    spec = runner.spec
    room = num_blocks(config, spec.kv_bytes_per_token, runner.free_bytes(), spec.max_length, config.max_batch_size)
    tokens = room.blocks * config.block_size
    return {
        "size_bytes": tokens * spec.kv_bytes_per_token,
        "tokens": tokens,
        "token_bytes": spec.kv_bytes_per_token,
        "longest_sequence": spec.max_length,
    }


def _rates(spec: Any) -> dict[str, Any]:
    from penstock.models.hardware import copy_bandwidth, matmul_rate

    return {
        "memory_gb_per_s": copy_bandwidth(spec.device, MEASURE_S) / 1e9,
        "matmul_gflop_per_s": matmul_rate(spec.device, spec.dtype, MEASURE_S) / 1e9,
        "matmul_float32_gflop_per_s": matmul_rate(spec.device, "float32", MEASURE_S) / 1e9,
    }


def _speed(config: EngineConfig, loaded: Any) -> dict[str, Any]:
    begin = time.perf_counter()
    with loaded_engine(loaded.runner, loaded.tokenizer, config=config) as engine, event_loop() as loop:
        start_s = time.perf_counter() - begin
        loop.run(_streams(engine, 1))
        first_token_s, one = loop.run(_streams(engine, 1))
        return {
            "start_s": start_s,
            "first_token_s": first_token_s,
            "single_stream_tokens_per_s": one,
            f"{STREAMS}_streams_tokens_per_s": loop.run(_streams(engine, STREAMS))[1],
        }


async def _streams(engine: InferenceEngine, count: int) -> tuple[float, float]:
    """(Slowest first token in seconds, new tokens per second of all together) of `count` concurrent requests."""
    params = replace(engine.default_params(), max_tokens=NEW_TOKENS, ignore_eos=True, seed=0)
    prompts = [f"# {number}\n{PROMPT}" for number in range(count)]
    begin = time.perf_counter()
    done = await asyncio.gather(*(stream(engine, prompt, params, lambda delta: None) for prompt in prompts))
    seconds = time.perf_counter() - begin
    return max(timing.first_token_s for _, timing in done), sum(timing.num_tokens for _, timing in done) / seconds

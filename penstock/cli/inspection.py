"""The inspections of `penstock doctor`: each fills one section of the report with plain data.

Times are seconds, sizes bytes. An inspection that raises becomes a problem and stops none of the others. Never judges
the results (`problems` does). Called by `doctor`.
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
from typing import Protocol

from penstock import __version__
from penstock.api.protocols import Engine
from penstock.cache.sizing import num_blocks
from penstock.cli.problems import Problem
from penstock.cli.session import JsonObject, loaded_engine, new_runner, quiet_libraries, run_on_own_thread, stream
from penstock.cli.terminal import one_line
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.errors import PenstockError
from penstock.models.protocol import ModelRunner, ModelSpec
from penstock.sampling import SamplingParams

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "uvloop")
MEASURE_S = 0.3
STREAMS, NEW_TOKENS = 16, 32
PROMPT = "def read_lines(path):\n"


class LoadedModel(Protocol):
    """What `load` returns; importing its class would load torch."""

    @property
    def runner(self) -> ModelRunner: ...
    @property
    def tokenizer(self) -> object: ...


def inspect_machine(config: EngineConfig) -> tuple[dict[str, JsonObject], list[Problem]]:
    """The report by section, and a problem for each inspection that failed."""
    report: dict[str, JsonObject] = {}
    failures: list[Problem] = []
    loaded: list[LoadedModel] = []
    for section, inspect in (
        ("versions", versions),
        ("imports", _imports),
        ("hardware", _hardware),
        ("model", lambda: run_on_own_thread(_model, config, loaded)),
        ("cache", lambda: _cache(config, loaded[0].runner)),
        ("rates", lambda: run_on_own_thread(_rates, loaded[0].runner.spec)),
        ("speed", lambda: _speed(config, loaded[0])),
    ):
        if section in ("cache", "rates", "speed") and not loaded:
            continue
        _attempt(section, inspect, report, failures)
    return report, failures


def _attempt(
    section: str, inspect: Callable[[], JsonObject], report: dict[str, JsonObject], failures: list[Problem]
) -> None:
    try:
        report[section] = inspect()
    except PenstockError as error:
        remedy = "follow the message, then run this command again"
        failures.append(Problem(f"{section}: {one_line(error)}", remedy, is_fatal=True))
    except Exception as error:
        remedy = "reinstall: pip install --force-reinstall penstock torch transformers"
        failures.append(Problem(f"{section}: {type(error).__name__}: {one_line(error)}", remedy, is_fatal=True))


def versions() -> JsonObject:
    """Versions of Penstock, Python and the main libraries; None for one that is not installed."""
    return {"penstock": __version__, "python": platform.python_version()} | {name: _version(name) for name in LIBRARIES}


def _imports() -> JsonObject:
    start_s = time.perf_counter()
    quiet_libraries()
    from penstock.models import loading  # noqa: F401  (imports torch and transformers too)

    return {"import_s": time.perf_counter() - start_s}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _hardware() -> JsonObject:
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


def _model(config: EngineConfig, loaded: list[LoadedModel]) -> JsonObject:
    """Loads the demo model and appends it to `loaded`, for the inspections after this one."""
    from penstock.models.loading import load

    start_s = time.perf_counter()
    loaded.append(load(None, None, config))
    spec = loaded[0].runner.spec
    return {
        "default_model": str(MODEL_DIR),
        "load_s": time.perf_counter() - start_s,
        "device": spec.device,
        "dtype": spec.dtype,
        "weight_bytes": spec.weight_bytes,
        "weight_mode": spec.weight_mode,
        "kernels": spec.kernels,
        "rewrites": ", ".join(spec.rewrites) or "none",
    }


def _cache(config: EngineConfig, runner: ModelRunner) -> JsonObject:
    spec = runner.spec
    size = num_blocks(config, spec.kv_bytes_per_token, runner.free_bytes(), spec.max_length, config.max_batch_size)
    tokens = size.blocks * config.block_size
    return {
        "size_bytes": tokens * spec.kv_bytes_per_token,
        "tokens": tokens,
        "token_bytes": spec.kv_bytes_per_token,
        "longest_sequence": spec.max_length,
    }


def _rates(spec: ModelSpec) -> JsonObject:
    from penstock.models.hardware import copy_bandwidth, matmul_rate

    return {
        "memory_gb_per_s": copy_bandwidth(spec.device, MEASURE_S) / 1e9,
        "matmul_gflop_per_s": matmul_rate(spec.device, spec.dtype, MEASURE_S) / 1e9,
        "matmul_float32_gflop_per_s": matmul_rate(spec.device, "float32", MEASURE_S) / 1e9,
    }


def _speed(config: EngineConfig, loaded: LoadedModel) -> JsonObject:
    start_s = time.perf_counter()
    with loaded_engine(loaded.runner, loaded.tokenizer, config=config) as engine, new_runner() as runner:
        engine_start_s = time.perf_counter() - start_s
        params = replace(engine.default_params(), max_tokens=NEW_TOKENS, ignore_eos=True, seed=0)
        runner.run(_streams(engine, params, 1))
        first_token_s, single_rate = runner.run(_streams(engine, params, 1))
        _, total_rate = runner.run(_streams(engine, params, STREAMS))
        return {
            "start_s": engine_start_s,
            "first_token_s": first_token_s,
            "single_stream_tokens_per_s": single_rate,
            f"{STREAMS}_streams_tokens_per_s": total_rate,
        }


async def _streams(engine: Engine, params: SamplingParams, count: int) -> tuple[float, float]:
    """(Slowest first token in seconds, new tokens per second in total) of `count` concurrent requests."""
    prompts = [f"# {number}\n{PROMPT}" for number in range(count)]
    start_s = time.perf_counter()
    results = await asyncio.gather(*(stream(engine, prompt, params, lambda delta: None) for prompt in prompts))
    seconds = time.perf_counter() - start_s
    return max(timing.first_token_s for _, timing in results), sum(timing.num_tokens for _, timing in results) / seconds

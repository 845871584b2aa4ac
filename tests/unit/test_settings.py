"""Settings as type checkers see them, and environment variables that are none."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from penstock import EngineConfig, FinishReason, InferenceEngine
from penstock.api.arguments import RequestOptions
from penstock.config import ALIASES, Settings, warn_of_misspelled_variables

USER_CODE = """
import asyncio
from penstock import EngineConfig, InferenceEngine, LLM, SamplingParams

async def main() -> None:
    async with InferenceEngine(max_batch_size=4, seed=1) as engine:
        output = await engine.generate("a", SamplingParams(max_tokens=3))
        reveal_type(output)
        async for delta in engine.generate([{"role": "user", "content": "hi"}]):
            reveal_type(delta)
        stats = engine.get_stats()
        reveal_type(stats["queue"])
        task = asyncio.create_task(engine.generate("a"))
        reveal_type(await task)

EngineConfig(max_batch_size=8, kv_cache_bytes=1 << 20)
EngineConfig(max_batch_siez=3)
InferenceEngine(max_batch_siez=3)
LLM(max_batch_siez=3)
EngineConfig(max_batch_size="many")
"""


def test_typed_keywords_are_the_settings() -> None:
    hints = get_type_hints(Settings)
    assert hints.keys() == {*EngineConfig.model_fields, *ALIASES}
    for name, field in EngineConfig.model_fields.items():
        if name not in ("batching_strategy", "disabled_rewrites"):  # whose strings and lists are converted
            assert hints[name] == field.annotation, name
    assert all(hints[alias] == hints[name] for alias, name in ALIASES.items())


def test_options_of_submit_request_are_the_keywords_of_generate() -> None:
    keywords = set(inspect.signature(InferenceEngine.generate).parameters)
    assert get_type_hints(RequestOptions).keys() == keywords - {"self", "prompt", "params", "priority", "callback"}


def test_mypy_finds_a_misspelled_setting_and_knows_what_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "user.py"
    path.write_text(USER_CODE)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(path)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=300)
    text = checked.stdout
    assert text.count('Unexpected keyword argument "max_batch_siez"') == 3, text + checked.stderr
    assert 'has incompatible type "str"; expected "int"' in text
    revealed = [line.split('is "')[1].rstrip('"') for line in text.splitlines() if "Revealed type" in line]
    output = "penstock.outputs.RequestOutput"
    assert revealed == [output, "penstock.outputs.Delta", "dict[str, int]", output]


def test_a_misspelled_environment_variable_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PENSTOCK_MAX_BATCH_SIEZ", "3")
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", "/tmp")
    warn_of_misspelled_variables.cache_clear()
    EngineConfig()
    EngineConfig()
    assert [record.message for record in caplog.records] == [
        "the environment variable PENSTOCK_MAX_BATCH_SIEZ is no setting and has no effect: "
        "did you mean PENSTOCK_MAX_BATCH_SIZE?"
    ]


def test_a_finish_reason_equals_its_string() -> None:
    assert FinishReason.STOP == "stop"
    assert f"{FinishReason.DEADLINE}" == "deadline"
    assert {"length": 1}[FinishReason.LENGTH] == 1

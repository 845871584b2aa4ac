"""Settings as type checkers see them, and environment variables that are none."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from harness.processes import own_environment
from penstock import (
    ConfigurationError,
    EngineConfig,
    FinishReason,
    InferenceEngine,
    OutOfMemory,
    ReplicatedEngine,
    ScriptedModel,
)
from penstock.api.arguments import RequestOptions
from penstock.config import ALIASES, Settings, warn_of_misspelled_variables
from penstock.held_settings import LIVE_SETTINGS, QUEUE_SETTINGS
from penstock.serving import ServingSettings
from penstock.serving.process import ProcessSettings

ROOT = Path(__file__).resolve().parents[2]
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


# Nothing in it is wrong.
RIGHT_CODE = """import asyncio
import penstock
from penstock import LLM, Delta, EngineConfig, EngineOverloaded, InferenceEngine
from penstock import RequestHandle, RequestOutput, SamplingParams

async def one(engine: InferenceEngine) -> str:
    handle = engine.generate("a", SamplingParams(temperature=0.0, stop=["\\n"]))
    text = ""
    async for delta in handle:
        text += delta.text
    output = await handle
    stats = engine.get_stats()
    print(stats["queue"], stats["totals"]["drafted_tokens"], stats["config"]["seed"])
    print(output.outputs[0].finish_reason, output.text, output.metrics.total_s)
    return text

async def many(engine: InferenceEngine) -> list[RequestOutput]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(engine.generate(str(i))) for i in range(3)]
    except* EngineOverloaded:
        raise
    outputs = await asyncio.gather(*(engine.generate(str(i)) for i in range(3)))
    return [t.result() for t in tasks] + list(outputs)

def sync() -> None:
    llm = LLM(max_batch_size=4)
    outs = llm.generate(["a", "b"], SamplingParams(max_tokens=4))
    print(outs[0].outputs[0].text)
    for o in llm.chat([{"role": "user", "content": "hi"}]):
        print(o.text)

def on(delta: Delta) -> None:
    print(delta.text)

async def main() -> None:
    async with InferenceEngine(enable_speculative_decoding="auto") as engine:
        print(await one(engine), await many(engine))
        engine.generate("x", callback=on).cancel()
        h: RequestHandle = engine.generate("x")
        print(await asyncio.wait_for(h, 3), penstock.__version__)
    async with InferenceEngine(config=EngineConfig(enable_speculative_decoding=False)) as engine:
        print(await asyncio.wait_for(engine.generate("a"), 3))

asyncio.run(main())
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


@pytest.mark.timeout(300)
def test_mypy_finds_a_misspelled_setting_and_knows_what_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "user.py"
    path.write_text(USER_CODE)
    # In the checkout, whose cache of checked modules spares most of the work where scripts/check has run.
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(path)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    text = checked.stdout
    assert text.count('Unexpected keyword argument "max_batch_siez"') == 3, text + checked.stderr
    assert 'has incompatible type "str"; expected "int"' in text
    revealed = [line.split('is "')[1].rstrip('"') for line in text.splitlines() if "Revealed type" in line]
    output = "penstock.outputs.RequestOutput"
    assert revealed == [output, "penstock.outputs.Delta", "dict[str, int]", output]


@pytest.fixture(scope="module")
def pyright(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What pyright reports in strict mode of the wrong and of the right code, which share what it has to read.

    Node comes with `pyright[nodejs]`, so nothing is downloaded.
    """
    pytest.importorskip("pyright", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("pyright")
    codes = {"user.py": USER_CODE, "right.py": RIGHT_CODE}
    for name, code in codes.items():
        (folder / name).write_text(code)
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *codes]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=own_environment())
    assert checked.stdout.startswith("{"), checked.stdout + checked.stderr
    answer = json.loads(checked.stdout)
    assert answer["summary"]["filesAnalyzed"] == len(codes)
    reports = answer["generalDiagnostics"]
    return {name: [report for report in reports if Path(report["file"]).name == name] for name in codes}


@pytest.mark.timeout(300)
def test_pyright_finds_a_misspelled_setting_and_knows_what_comes_back(pyright: dict[str, list[dict[str, Any]]]) -> None:
    reports = pyright["user.py"]
    errors = [report["message"] for report in reports if report["severity"] == "error"]
    assert errors[:3] == ['No parameter named "max_batch_siez"'] * 3
    assert 'cannot be assigned to parameter "max_batch_size" of type "int"' in errors[3]
    assert len(errors) == 4
    revealed = [report["message"].split(" is ")[1] for report in reports if report["severity"] == "information"]
    assert revealed == ['"RequestOutput"', '"Delta"', '"dict[str, int]"', '"RequestOutput"']


@pytest.mark.timeout(300)
def test_pyright_has_nothing_to_say_about_right_code(pyright: dict[str, list[dict[str, Any]]]) -> None:
    assert pyright["right.py"] == []


def test_a_misspelled_environment_variable_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PENSTOCK_MAX_BATCH_SIEZ", "3")
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", "/tmp")
    warn_of_misspelled_variables.cache_clear()
    EngineConfig()
    EngineConfig()
    assert [record.message for record in caplog.records] == [
        "the environment variable PENSTOCK_MAX_BATCH_SIEZ is not a setting and has no effect: "
        "did you mean PENSTOCK_MAX_BATCH_SIZE?"
    ]


def test_a_misspelled_environment_variable_of_the_server_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PENSTOCK_SERVE_PROT", "9000")
    warn_of_misspelled_variables.cache_clear()
    EngineConfig()
    ProcessSettings()
    (record,) = caplog.records
    assert record.message.endswith(
        "PENSTOCK_SERVE_PROT is not a setting and has no effect: did you mean PENSTOCK_SERVE_PORT?"
    )


def test_a_finish_reason_equals_its_string() -> None:
    assert FinishReason.STOP == "stop"
    assert f"{FinishReason.DEADLINE}" == "deadline"
    assert {"length": 1}[FinishReason.LENGTH] == 1


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_none_may_be_written_as_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an option nor the environment could give `max_sequence_length` the value that its description names."""
    monkeypatch.setenv("PENSTOCK_MAX_SEQUENCE_LENGTH", text)
    config = EngineConfig(target=text, tokenizer="none")  # type: ignore[arg-type]
    assert (config.max_sequence_length, config.target, config.tokenizer) == (None, None, "none")
    with pytest.raises(ConfigurationError, match="max_batch_size: Input should be a valid integer"):
        EngineConfig(max_batch_size=text)  # type: ignore[arg-type]


def test_rewrites_may_be_written_as_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment they raised an error of pydantic-settings, and no option could name them."""
    monkeypatch.setenv("PENSTOCK_DISABLED_REWRITES", "packed_norms, kernels")
    assert EngineConfig().disabled_rewrites == ("packed_norms", "kernels")
    assert EngineConfig(disabled_rewrites="fused_layers").disabled_rewrites == ("fused_layers",)
    with pytest.raises(ConfigurationError, match="there is no rewrite 'kernel': did you mean 'kernels'"):
        EngineConfig(disabled_rewrites="kernel")


def test_what_is_not_json_in_the_environment_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SERVE_API_KEYS", "secret")
    with pytest.raises(ConfigurationError, match=r'"api_keys".*: in the environment it is JSON') as caught:
        ServingSettings()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "cannot read the settings"),
        (b"\xff\xfe", "cannot read the settings"),
        (b"- a", "must hold a mapping of setting names"),
        (b"1: 2", "must hold a mapping of setting names"),
    ],
)
def test_a_file_that_is_no_mapping_of_names_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    """Bytes that are no UTF-8 and names that are no text raised errors of other types."""
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    for settings in (EngineConfig, ServingSettings):
        with pytest.raises(ConfigurationError, match=says):
            settings.from_yaml(file)  # type: ignore[attr-defined]


def scripted(config: EngineConfig | None = None) -> InferenceEngine:
    return InferenceEngine(ScriptedModel([5, 6]), None, config, skip_tokenizer_init=True, batch_timeout_ms=0)


@contextmanager
def scripted_running(config: EngineConfig) -> Iterator[InferenceEngine]:
    engine = scripted(config)
    engine.start()
    yield engine
    engine.stop()


def num_tokens(engine: InferenceEngine) -> int:
    return int(engine.get_stats()["max_sequence_length"] or 0)


def test_a_setting_that_was_read_at_start_is_not_assigned_while_the_engine_runs() -> None:
    """It was, and had no effect."""
    engine = scripted()
    engine.config.kv_cache_tokens = 320
    engine.start()
    assert num_tokens(engine) == 320
    for name, value in (("kv_cache_tokens", 640), ("block_size", 4), ("seed", 1), ("max_model_len", 8)):
        with pytest.raises(ConfigurationError, match=r"no effect.* can be changed: batch_timeout_ms, .*target"):
            setattr(engine.config, name, value)
    engine.config.kv_cache_tokens = 320  # what it is
    engine.config.max_num_seqs = 3
    assert (engine.config.max_batch_size, engine.config.block_size) == (3, 16)
    engine.stop()
    engine.config.kv_cache_tokens = 640
    with scripted_running(engine.config) as other:
        assert num_tokens(other) == 640


def test_copies_of_settings_are_free() -> None:
    with scripted_running(EngineConfig(kv_cache_tokens=320)) as engine:
        copied = engine.config.model_copy()
        copied.kv_cache_tokens = 640
        assert EngineConfig(kv_cache_tokens=64).kv_cache_tokens == 64


def test_settings_with_which_an_engine_could_not_start_can_be_changed() -> None:
    class Small(ScriptedModel):
        def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
            raise OutOfMemory("out of memory")

    engine = InferenceEngine(Small([5]), None, skip_tokenizer_init=True)
    with pytest.raises(OutOfMemory):
        engine.start()
    engine.config.kv_cache_tokens = 16


def test_of_replicas_only_the_limits_of_the_queue_can_be_changed() -> None:
    """What else was assigned reached the queue alone, and the replicas had copies."""
    engine = ReplicatedEngine([ScriptedModel([5]), ScriptedModel([5])], None, skip_tokenizer_init=True)
    engine.start()
    engine.config.max_queue_size = 7
    with pytest.raises(ConfigurationError, match=r"no effect.* changed: max_queue_size, max_queued_tokens$"):
        engine.config.max_batch_size = 4
    engine.stop()
    engine.config.max_batch_size = 4


def test_settings_that_are_read_at_start_say_so_and_no_others() -> None:
    for name, field in EngineConfig.model_fields.items():
        says = "Read at" in (field.description or "") or "at start" in (field.description or "")
        assert not (says and name in LIVE_SETTINGS), name
    assert EngineConfig.model_fields.keys() >= LIVE_SETTINGS >= QUEUE_SETTINGS

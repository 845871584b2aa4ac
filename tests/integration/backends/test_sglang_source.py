"""SGLang's own source has the names, signatures and words that `penstock.backends` and its stand-in rely on.

The wheel is fetched when the tests run, and only read: SGLang needs a GPU to be imported whole.
"""

from __future__ import annotations

import ast
import inspect
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, get_args, get_type_hints

import pytest

from penstock import SamplingParams, StructuredOutputs
from penstock.backends.sglang_params import sglang_arguments
from penstock.backends.sglang_process import DEFAULTS, FIXED
from tests.integration.outside.suites import fetched_wheel
from tests.unit.backends import fake_sglang

VERSION = "0.5.23"
MANAGER = ("TokenizerManager", "TokenizerControlMixin")


@dataclass(frozen=True)
class Source:
    """The files of a wheel."""

    wheel: zipfile.ZipFile

    def text(self, path: str) -> str:
        return self.wheel.read(f"sglang/srt/{path}").decode()

    def definitions(self, path: str) -> dict[str, Any]:
        """The classes and functions at the top of a file, by name."""
        tree = ast.parse(self.text(path))
        return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | Function)}

    def options(self) -> Iterator[str]:
        """The names of all fields of `ServerArgs`."""
        for name in self.wheel.namelist():
            if name.startswith("sglang/srt/arg_groups/fields/"):
                for node in ast.parse(self.wheel.read(name)).body:
                    yield from fields(node) if isinstance(node, ast.ClassDef) else ()


Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    folder = tmp_path_factory.mktemp("sglang")
    with zipfile.ZipFile(fetched_wheel("sglang", VERSION, "manylinux_2_34_x86_64", folder)) as wheel:
        yield Source(wheel)


def methods(*classes: ast.ClassDef) -> dict[str, Any]:
    return {node.name: node for each in classes for node in each.body if isinstance(node, Function)}


def fields(node: ast.ClassDef) -> list[str]:
    return [
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]


def parameters(function: Any) -> list[str]:
    every = function.args
    return [argument.arg for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs)]


def assert_like(stand_in: Callable[..., Any], real: Any) -> None:
    """The stand-in takes nothing that the real function does not, and is awaited if that is."""
    signature = inspect.signature(stand_in)
    named = [name for name, each in signature.parameters.items() if each.kind is not each.VAR_POSITIONAL]
    assert set(named) <= {*parameters(real), "self", "cls"}, real.name
    is_async = inspect.iscoroutinefunction(stand_in) or inspect.isasyncgenfunction(stand_in)
    assert isinstance(real, ast.AsyncFunctionDef) == is_async, real.name


def test_the_engine_is_made_and_called_as_sglangs(source: Source) -> None:
    engine = source.definitions("entrypoints/engine.py")["Engine"]
    real = methods(engine)
    for name in ("async_generate", "async_load_lora_adapter", "async_unload_lora_adapter"):
        assert_like(getattr(fake_sglang.Engine, name), real[name])
    assert_like(fake_sglang.Engine.shutdown, real["shutdown"])
    assert {"run_scheduler_process_func", "run_detokenizer_process_func"} <= set(fields(engine))
    text = source.text("entrypoints/engine.py")
    for words in (
        "    configure_logger,\n",
        "atexit.register(self.shutdown)",
        "self.send_to_rpc = ",
        "self.tokenizer_manager = tokenizer_manager",
        "tokenizer_manager._subprocess_watchdog = subprocess_watchdog",
        "self.loop = ",
        "proc = mp.Process(",  # whose start is recorded
        "proc.start()",
    ):
        assert words in text, words
    assert "def stop(self)" in source.text("utils/watchdog.py")


def test_the_processes_run_sglangs_own_functions(source: Source) -> None:
    for path, name in (
        ("managers/scheduler.py", "run_scheduler_process"),
        ("managers/detokenizer_manager.py", "run_detokenizer_process"),
    ):
        assert name in source.definitions(path)
        assert "parent_process.send_signal(signal.SIGQUIT)" in source.text(path)


def test_the_manager_has_the_methods_that_are_called(source: Source) -> None:
    classes = {**source.definitions("managers/tokenizer_control_mixin.py")}
    classes |= source.definitions("managers/tokenizer_manager.py")
    real = methods(*(classes[name] for name in MANAGER))
    for name in (
        *("abort_request", "pause_generation", "continue_generation", "update_weights_from_disk", "flush_cache"),
        "handle_loop",
    ):
        assert_like(getattr(fake_sglang.TokenizerManager, name), real[name])
    text = source.text("managers/tokenizer_manager.py")
    for words in ("self.event_loop = None", "if self.event_loop is not None:", "self.model_update_lock = RWLock()"):
        assert words in text, words
    for words in ("self.context_len = ", "self.tokenizer = ", "self.model_config = ", "vocab_size"):
        assert words in text, words
    assert "def writer_lock(self)" in source.text("utils/aio_rwlock.py")
    assert "def get_default_sampling_params(self)" in source.text("configs/model_config.py")


def test_orders_have_sglangs_fields(source: Source) -> None:
    real = source.definitions("managers/io_struct.py")
    for order in (
        fake_sglang.PauseGenerationReqInput,
        fake_sglang.ContinueGenerationReqInput,
        fake_sglang.UpdateWeightFromDiskReqInput,
    ):
        assert {field.name for field in dataclass_fields(order)} <= set(fields(real[order.__name__]))
    modes = get_args(get_type_hints(fake_sglang.PauseGenerationReqInput)["mode"])
    assert ast.unparse(real["PauseGenerationReqInput"]).count(repr(modes)[1:-1]) == 1
    assert {"success", "error_message"} <= set(fields(real["LoRAUpdateOutput"]))
    assert {"success", "message"} <= set(fields(real["FlushCacheReqOutput"]))


def test_parameters_have_sglangs_names(source: Source) -> None:
    real = set(fields(source.definitions("sampling/sampling_params.py")["SamplingParams"]))
    for structured in (
        StructuredOutputs(json={"type": "object"}),
        StructuredOutputs(regex="a"),
        StructuredOutputs(choice=["a"]),
    ):
        params = SamplingParams(
            seed=3, stop=["x"], stop_token_ids=[3], logit_bias={3: 1.0}, structured_outputs=structured
        )
        assert sglang_arguments(params, 0).keys() <= real
    assert "_SAMPLING_EPS = 1e-6" in source.text("sampling/sampling_params.py")
    assert "MAX_STOP_COUNT = 32" in source.text("sampling/sampling_params.py")


def test_options_are_sglangs(source: Source) -> None:
    real = set(source.options())
    assert {field.name for field in dataclass_fields(fake_sglang.ServerArgs)} | DEFAULTS.keys() | FIXED.keys() <= real
    assert {"tp_size", "mem_fraction_static", "context_length"} <= real
    assert "ServerArgs = msgspec.defstruct(" in source.text("server_args.py")
    assert '"SGLANG_RETURN_ORIGINAL_LOGPROB"' in source.text("layers/sampler.py")
    assert '"llguidance"' in source.text("arg_groups/choices.py")
    assert "Requests with higher priority integer values will be scheduled first by default" in source.text(
        "arg_groups/fields/schedule.py"
    )


def test_outputs_have_sglangs_words(source: Source) -> None:
    text = source.text("managers/tokenizer_manager.py")
    for word in (
        *("text", "output_ids", "meta_info", "finish_reason", "weight_version", "cached_tokens"),
        *("output_token_logprobs", "output_top_logprobs", "input_token_logprobs", "input_top_logprobs"),
    ):
        assert f'"{word}"' in text, word
    for word in ("weight_versions", "version", "start", "end"):
        assert f'"{word}"' in source.text("utils/weight_versions.py"), word
    reasons = source.text("managers/schedule_batch.py")
    for word in ('"type": "abort"', '"type": "stop"', '"type": "length"', '"matched"', '"status_code"', '"message"'):
        assert word in reasons, word

"""docs/design.md lists every default length, and the code has no other."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from penstock import (
    EngineConfig,
    GenerationConfig,
    HuggingFaceBackend,
    InferenceEngine,
    InferenceModule,
    ParallelSampler,
    PerformanceOptimizer,
    SamplingParams,
    ScriptedModel,
    SpeculativeDecoder,
)
from penstock.backends import BaseBackend
from penstock.backends.services.service_config import ServiceConfig
from penstock.cli.command import make_parser
from penstock.cli.load import Load
from penstock.cli.session import params_with
from penstock.serving.completion_request import CompletionRequest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(\w[\w.]*)` \| (\d+) \|", re.MULTILINE)
LENGTHS = {"max_tokens", "max_new_tokens", "default_max_tokens", "max_length"}
# The context of a model, not the length of a request.
CONTEXTS = {("scripted.py", "max_length"), ("scripted_replies.py", "max_length"), ("checks.py", "max_length")}
Default = tuple[str, int]


def listed() -> dict[str, int]:
    """The table: the name of a default, and its tokens."""
    section = (ROOT / "docs/design.md").read_text().partition("## Default lengths\n")[2].partition("\n## ")[0]
    return {name: int(tokens) for name, tokens in ROW.findall(section)}


def defaults_in(source: str) -> Iterator[Default]:
    """(name, tokens) of every field, variable and argument of a file that is named like a length and has a number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            pairs = [
                *zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            values = [(argument.arg, value) for argument, value in pairs]
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            values = [(target.id, node.value) for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        for name, value in values:
            if name.lower() in LENGTHS and (tokens := number_of(value)) is not None:
                yield name.lower(), tokens


def number_of(value: ast.expr | None) -> int | None:
    """The integer that an expression is, or that the first argument of its `Field(...)` is."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field" and value.args:
        value = value.args[0]
    if isinstance(value, ast.Constant) and isinstance(value.value, int):
        return value.value
    if isinstance(value, ast.BinOp):  # 1 << 20
        return int(eval(ast.unparse(value))) if not any(isinstance(n, ast.Name) for n in ast.walk(value)) else None
    return None


def max_length(function: Callable[..., object]) -> int:
    """The default of the argument `max_length`."""
    return int(inspect.signature(function).parameters["max_length"].default)


def max_new_tokens(function: Callable[..., object]) -> int:
    """The default of the argument `max_new_tokens`."""
    return int(inspect.signature(function).parameters["max_new_tokens"].default)


def test_the_table_states_the_defaults_of_the_code() -> None:
    assert listed() == {
        "EngineConfig.default_max_tokens": EngineConfig().default_max_tokens,
        "CompletionRequest.max_tokens": CompletionRequest(prompt="x").max_tokens,
        "Load.max_tokens": Load(1).max_tokens,
        "ServiceConfig.max_tokens": ServiceConfig().max_tokens,
        "SamplingParams.max_tokens": SamplingParams().max_tokens,
        "GenerationConfig.max_length": GenerationConfig().max_length,
        "PerformanceOptimizer.optimized_generate.max_length": max_length(PerformanceOptimizer.optimized_generate),
        "SpeculativeDecoder.speculative_generate.max_length": max_length(SpeculativeDecoder.speculative_generate),
        "ParallelSampler.parallel_generate.max_length": max_length(ParallelSampler.parallel_generate),
        "HuggingFaceBackend.agenerate.max_new_tokens": max_new_tokens(HuggingFaceBackend.generate),
        "BaseBackend.generate.max_length": max_length(BaseBackend.generate),
        "InferenceModule.batch_generate_with_tools.max_new_tokens": max_new_tokens(
            InferenceModule.batch_generate_with_tools
        ),
    }


def test_the_code_has_no_default_length_outside_the_table() -> None:
    """Six places had six numbers: 256, 16, 512, 50, 200 and 512."""
    files = sorted((ROOT / "penstock").rglob("*.py"))
    defaults = [
        default
        for path in files
        for default in defaults_in(path.read_text())
        if (path.name, default[0]) not in CONTEXTS
    ]
    assert sorted(defaults) == sorted((name.rpartition(".")[2], tokens) for name, tokens in listed().items())


def test_the_scan_sees_fields_variables_and_arguments() -> None:
    source = "MAX_TOKENS = 200\nmax_length: int = Field(9, ge=1)\ndef f(a, max_tokens=7, *, max_length=1 << 3): pass\n"
    assert sorted(defaults_in(source)) == [("max_length", 8), ("max_length", 9), ("max_tokens", 7), ("max_tokens", 200)]


def test_the_command_line_has_the_length_of_the_engine() -> None:
    for command in (["generate", "x"], ["chat"]):
        assert make_parser().parse_args(command).max_tokens is None
    with_default = InferenceEngine(ScriptedModel([5]), default_max_tokens=7)
    for engine, tokens in ((InferenceEngine(ScriptedModel([5])), 256), (with_default, 7)):
        engine.start()
        assert params_with(engine, {}).max_tokens == tokens
        assert params_with(engine, {"max_tokens": 3}).max_tokens == 3
        engine.stop(0)

"""MaskBench: real schemas with valid and invalid instances, from a file that an environment variable names.

A line each: {"name", "schema", "tests": [{"data", "valid"}]}. A schema is clean if it is compiled, accepts every valid
instance and refuses every invalid one. `format` is left apart: what only a format makes invalid does not count.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from penstock import GrammarError, StructuredOutputs
from penstock.constraints.compiler import GrammarCompiler
from penstock.demo import MODEL_DIR

PATH = os.environ.get("PENSTOCK_MASKBENCH", "")
MIN_CLEAN = 0.8  # all of MaskBench has 0.839, and the llguidance that we build on as many
EOS = 0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(PATH or "-").is_file(), reason="PENSTOCK_MASKBENCH names no file of schemas"),
]


@dataclass
class Figures:
    """What became of every schema, by name, and the seconds that compiling took."""

    clean: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    valid_refused: list[str] = field(default_factory=list)
    invalid_accepted: list[str] = field(default_factory=list)
    compile_s: list[float] = field(default_factory=list)


def schemas() -> list[dict[str, Any]]:
    content = Path(PATH).read_bytes()
    lines = gzip.decompress(content) if PATH.endswith(".gz") else content
    return [json.loads(line) for line in lines.splitlines()]


def is_accepted(grammar: Any, tokenizer: Any, data: Any) -> bool:
    constraint = grammar.start(ends_itself=False)
    text = json.dumps(data, ensure_ascii=False)
    try:
        constraint.advance([*tokenizer.encode(text, add_special_tokens=False), EOS])
    except GrammarError:
        return False
    return True


def only_formats_forbid(schema: Any, data: Any) -> bool:
    """Whether the instance is valid but for `format`, which a validator ignores unless it is told to check it."""
    return bool(jsonschema.validators.validator_for(schema)(schema).is_valid(data))


def measure() -> Figures:
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_DIR))
    compiler = GrammarCompiler(len(tokenizer), {EOS})
    compiler.compile(StructuredOutputs(choice=["warm"]), None, tokenizer)
    figures = Figures()
    for entry in schemas():
        begin = time.thread_time()  # a busy machine would fail it by the clock
        try:
            grammar = compiler.compile(StructuredOutputs(json=entry["schema"]), None, tokenizer)
        except GrammarError:
            figures.refused.append(entry["name"])
            continue
        finally:
            figures.compile_s.append(time.thread_time() - begin)
        wrong = [t for t in entry["tests"] if is_accepted(grammar, tokenizer, t["data"]) != t["valid"]]
        if any(not t["valid"] and not only_formats_forbid(entry["schema"], t["data"]) for t in wrong):
            figures.invalid_accepted.append(entry["name"])
        elif any(t["valid"] for t in wrong):
            figures.valid_refused.append(entry["name"])
        else:
            figures.clean.append(entry["name"])
    return figures


def test_schemas_of_maskbench_are_enforced_to_the_letter_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    figures = measure()
    times = sorted(figures.compile_s)
    p99 = times[len(times) * 99 // 100]
    counts = {name: len(getattr(figures, name)) for name in ("clean", "refused", "valid_refused", "invalid_accepted")}
    with capsys.disabled():
        print(f"\nMaskBench: {counts}, compile p99 {1e3 * p99:.1f} ms, max {1e3 * times[-1]:.1f} ms")
    assert figures.invalid_accepted == []
    assert len(figures.clean) >= MIN_CLEAN * len(times)
    assert p99 <= 0.05
    assert times[-1] <= 1

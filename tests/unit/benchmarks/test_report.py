"""From measurements to the report, with numbers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.footprint import Footprint, count
from harness.report import markdown_table, render
from harness.results import Results
from harness.roofline import cpu_facts
from harness.summary import summarize
from peers.workloads import WORKLOADS

SHAPE = Footprint(layers=1000, head=200, rows=50, attention=10)
MACHINE = {
    "kind": "machine",
    "model": "m",
    "cpu": "Some CPU",
    "features": ["avx2"],
    "cores": 2,
    "ram_bytes": 8 * 2**30,
    "system": "Linux",
    "versions": {"torch": "2.13.0"},
    "threads": 2,
    "read_bytes_s": 48_000.0,
    "bf16_ops_s": 1e6,
    "int8_ops_s": None,
}


def rate(engine: str, workload: str, run: int, tok_s: float) -> dict[str, Any]:
    """A measurement of a known workload with so many tokens per second."""
    work = WORKLOADS[workload]
    return {
        "model": "m",
        "kind": "rate",
        "engine": engine,
        "precision": "int8" if engine.endswith("int8") else "bf16",
        "own": engine.startswith("penstock"),
        "run": run,
        "time": f"2026-01-0{run + 1}T00:00:00+00:00",
        "workload": workload,
        "requests": work.requests,
        "prompt_tokens": work.requests * work.unique,
        "output_tokens": work.requests * work.output,
        "output_tok_s": tok_s if work.output > 1 else 1.0,
        "total_tok_s": tok_s,
    }


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    """Two engines; the second one was not measured on `prefill`."""
    results = Results(tmp_path / "r.jsonl")
    results.merge([MACHINE | {"run": run} for run in range(3)])
    results.merge([{"model": "m", "kind": "footprint", "shape": vars_of(SHAPE)}])
    for run, (mine, theirs) in enumerate([(10.0, 4.0), (12.0, 5.0), (11.0, 6.0)]):
        results.merge([rate("penstock-bf16", "single", run, mine), rate("vllm", "single", run, theirs)])
        results.merge([rate("penstock-bf16", "prefill", run, 513.0)])
    results.merge([{"model": "m", "kind": "load", "engine": "vllm", "run": 0, "load_s": 60.0}])
    return summarize(results, "m", ("single", "prefill"))


def vars_of(shape: Footprint) -> dict[str, int]:
    return {name: getattr(shape, name) for name in ("layers", "head", "rows", "attention")}


def test_ratio_is_that_of_the_medians_where_both_were_measured(summary: dict[str, Any]) -> None:
    assert summary["ratios"] == {"penstock-bf16": {"vllm": {"single": 2.2, "mean": 2.2}}}
    assert summary["engines"]["vllm"]["rates"] == {"single": 5.0}
    assert summary["engines"]["vllm"]["spread"] == 0.4
    assert summary["engines"]["vllm"]["load_s"] == 60.0


def test_own_engines_come_first(summary: dict[str, Any]) -> None:
    assert list(summary["engines"]) == ["penstock-bf16", "vllm"]
    assert (summary["runs"], summary["days"]) == (3, ["2026-01-01", "2026-01-02", "2026-01-03"])


def test_one_stream_is_held_against_bandwidth_and_a_prompt_against_arithmetic(summary: dict[str, Any]) -> None:
    found = summary["roofline"]["penstock-bf16"]
    assert found["read_fraction"] == round(2 * 1200 * 11 / 48_000, 3)
    operations = 2 * 512 * 1000 + 2 * 200 + 4 * (512 * 513 // 2) * 10
    assert found["ops_s"] == operations  # 513 tokens per second, prompt and new one: the prompt takes a second
    assert found["ops_fraction"] == round(operations / 1e6, 3)
    assert "ops_s" not in summary["roofline"]["vllm"]


def test_int8_weights_are_read_as_bytes_with_a_scale_per_row() -> None:
    assert SHAPE.read_bytes("int8") == 1000 + 200 + 4 * 50


def test_report_has_the_table_the_machine_and_the_roofline(summary: dict[str, Any]) -> None:
    text = render(summary, "python compare.py")
    assert "| engine | weights | single | prefill | spread |\n" in text
    assert "| penstock-bf16 | bfloat16 | 11.00 | 513.0 | 18% |\n" in text
    assert "| vllm | bfloat16 | 5.00 |  | 40% |\n" in text
    assert "| vllm (bf16) | 2.20 |  | 2.20 |\n" in text
    assert "- Some CPU, 2 cores, 8 GiB; avx2\n" in text
    assert "python compare.py" in text
    assert "2026-01-01 to 2026-01-03; runs: 3." in text


def test_report_of_nothing_but_own_rates_is_still_a_report(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.merge([rate("penstock-int8", "single", 0, 3.0)])
    text = render(summarize(results, "m", ("single",)), "c")
    assert "| penstock-int8 | int8 weights | 3.00 | 0% |\n" in text
    assert "What the machine allows" not in text


def test_table_aligns_numbers_to_the_right() -> None:
    assert markdown_table(("a", "b"), [["x", 1.5]]) == "| a | b |\n| --- | ---: |\n| x | 1.50 |\n"


def test_footprint_counts_a_tied_embedding_once_and_leaves_out_a_lookup() -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 5}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (6, 4) for i in range(2)}
    assert count(shapes, config) == Footprint(layers=48, head=40, rows=22, attention=30)
    assert count(shapes | {"lm_head.weight": (12, 4)}, config) == Footprint(layers=48, head=48, rows=24, attention=30)


def test_processor_is_told_by_its_name_and_features() -> None:
    text = "processor : 0\nmodel name : Some CPU @ 2 GHz\nflags : fpu avx2 avx512f amx_int8\n\nmodel name : other\n"
    assert cpu_facts(text) == {"cpu": "Some CPU @ 2 GHz", "features": ["avx2", "avx512f", "amx_int8"]}

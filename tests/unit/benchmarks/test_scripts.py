"""The benchmarks themselves: each explains itself, and their pure parts count right."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

import host_overhead
import memory
import profile_step
import resume
import scaling
import startup
from harness.processes import own_environment
from latency import Waits, point

FOLDER = Path(__file__).parents[3] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
EXPLAINED = [*SCRIPTS, *sorted((FOLDER / "peers").glob("run_*.py"))]
# Runs every script named as if it were the program, with --help, and prints a JSON list: path, exit status, output.
ASK = """
import contextlib, io, json, os, runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0], output = [path, "--help"], os.path.dirname(path), io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print(json.dumps([path, end.code, output.getvalue()]))
"""


@pytest.fixture(scope="module")
def explanations() -> dict[str, list[str]]:
    """The lines that each script prints when it is asked for help; one process asks all, so that imports count once."""
    paths = [*map(str, EXPLAINED)]
    done = subprocess.run([sys.executable, "-c", ASK, *paths], env=own_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(path, status) for path, status, _ in answers] == [(path, 0) for path in paths]
    return {path: text.splitlines() for path, _, text in answers}


@pytest.mark.parametrize("script", EXPLAINED, ids=lambda path: path.stem)
def test_benchmark_explains_itself(explanations: dict[str, list[str]], script: Path) -> None:
    assert len(explanations[str(script)]) > 8


def test_list_of_benchmarks_names_each() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [script.name for script in SCRIPTS if f"]({script.name})" not in text] == []


def test_point_of_a_load_counts_what_was_refused() -> None:
    waits = Waits(first_s=[0.1, 0.3], later_s=[0.01], tokens=6, refused=1)
    found = point(2.0, 8.0, waits, seconds=3.0)
    assert (found["load"], found["completed"], found["refused"], found["output_tok_s"]) == (0.25, 2, 1, 2.0)
    assert found["first_token_ms"] == {"p50": 100.0, "p90": 300.0, "p99": 300.0}


def test_decoding_at_a_context_is_what_more_tokens_take() -> None:
    args = argparse.Namespace(concurrency=[1, 2], contexts=[100], prompt=8, output=10)
    seconds = {"e": {"2x8+10": 4.0, "1x100+1": 0.5, "1x100+11": 2.5}}
    curves = scaling.curves_of(seconds, args)
    assert curves == {"concurrency": {"e": [(2, 5.0)]}, "prefill": {"e": [(100, 200.0)]}, "decode": {"e": [(100, 5.0)]}}
    names = [workload.name for workload in scaling.workloads_of(args)]
    assert names == ["1x8+10", "2x8+10", "1x100+1", "1x100+11"]


def test_contexts_stay_within_the_models_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 100}')
    assert scaling.within(tmp_path, [50, 89, 90], output=10) == [50, 89]
    assert "100 positions" in capsys.readouterr().err


def test_decode_rows_have_blocks_and_tokens_of_their_own() -> None:
    args = argparse.Namespace(prefill=None, decode=2, context=5)
    first, second = profile_step.make_plan(args, block_size=4, vocab_size=100).rows
    assert (first.start, first.end, len(first.tokens), first.blocks.tolist()) == (4, 5, 5, [0, 1])
    assert second.blocks.tolist() == [2, 3]
    assert first.tokens != second.tokens


def test_prefill_row_is_a_whole_prompt() -> None:
    plan = profile_step.make_plan(argparse.Namespace(prefill=9), block_size=4, vocab_size=100)
    assert (plan.num_tokens, plan.rows[0].prompt_len, plan.rows[0].blocks.tolist()) == (9, 9, [0, 1, 2])


def test_resuming_is_told_by_medians_and_by_token() -> None:
    turns = [resume.Turn(2.0, resume_s, 15, 8, 0.32, 1.0) for resume_s in (0.3, 0.1, 0.2)]
    found = resume.summary(turns, length=100, block_size=4)
    assert (found["resume_ms"], found["urgent_ms"], found["computed_tokens"], found["moved_blocks"]) == (
        200,
        2000,
        15,
        8,
    )
    assert (found["move_us_per_token"], found["compute_us_per_token"]) == (10_000, 10_000)
    assert resume.summary([resume.Turn(prefill_s=1.0)], 100, 4)["move_us_per_token"] == 0


def test_memory_is_told_relative_to_weights_and_cache() -> None:
    sizes = {"import torch, transformers": 100, "load": 300, "work": 400}
    phases = [
        {"phase": name, "seconds": 1.0, "rss_bytes": size, "private_bytes": size, "peak_bytes": size + 50}
        for name, size in sizes.items()
    ]
    found = memory.summary({"phases": phases, "weight_bytes": 160, "cache_bytes": 40}, estimate=250)
    assert (found["load_over_weights"], found["work_over_needed"]) == (1.25, 1.5)
    assert (found["rss_over_needed"], found["peak_over_needed"]) == (2.0, 2.25)
    assert found["work_over_estimate"] == 1.2


def test_start_is_the_median_of_the_processes() -> None:
    lives = [
        {
            "phases": [{"phase": "a", "seconds": a}, {"phase": "b", "seconds": b, "peak_bytes": 7}],
            "torch_with_penstock": False,
            "weight_bytes": 5,
            "cache_bytes": 6,
        }
        for a, b in ((1.0, 10.0), (2.0, 9.0), (3.0, 1.0))
    ]
    found = startup.summary({"penstock": [3.0, 1.0, 2.0]}, lives)
    assert found["phases_s"] == {"a": 2.0, "b": 9.0}
    assert found["first_token_s"] == 11.0
    assert (found["imports_s"], found["peak_rss_bytes"]) == ({"penstock": 2.0}, 7)


def test_host_work_is_measured_in_its_parts() -> None:
    parts = asyncio.run(host_overhead.direct(requests=3, steps=4, tokenizer=None))
    assert list(parts) == ["plan", "commit", "fan-out", "together"]
    assert [len(seconds) for seconds in parts.values()] == [4] * 4
    assert all(sum(step[:3]) == pytest.approx(step[3]) for step in zip(*parts.values(), strict=True))
    assert min(min(seconds) for seconds in parts.values()) > 0


def test_model_waits_between_steps_of_a_live_engine() -> None:
    waits = asyncio.run(host_overhead.live(requests=3, steps=4, tokenizer=None, step_s=0.0))
    assert len(waits) >= 3
    assert min(waits) > 0

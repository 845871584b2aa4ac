"""What the peers are measured on is what `penstock bench` runs, id by id."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from peers.workloads import WORKLOADS, Limits, Workload, limits, parse, rate, shared_tokens, vocabulary
from penstock.cli import workloads as bench


@pytest.mark.parametrize("name", bench.WORKLOADS)
@pytest.mark.parametrize("repeat", [0, 2])
def test_requests_are_those_of_the_command(name: str, repeat: int) -> None:
    assert WORKLOADS[name].draw(repeat, 151936) == bench.WORKLOADS[name].draw(repeat, 151936)


def test_both_know_the_same_workloads() -> None:
    assert list(WORKLOADS) == list(bench.WORKLOADS)


def test_ids_fit_a_small_vocabulary_and_differ_between_repeats() -> None:
    first, second = (WORKLOADS["batch8"].draw(repeat, 100) for repeat in (0, 1))
    assert max(max(ids) for ids, _ in first) < 100
    assert [len(ids) for ids, _ in first] == [len(ids) for ids, _ in second]
    assert first != second


def test_list_of_workloads_names_known_ones_and_sizes() -> None:
    assert parse("single, 8x128+64") == [WORKLOADS["single"], Workload("8x128+64", 8, 0, 128, 64)]


@pytest.mark.parametrize("text", ["double", "8x128", "0x1+1", "8x128+0", "-1x2+3"])
def test_unknown_workload_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="choose from single, prefill"):
        parse(text)


def test_limits_count_whole_blocks_of_every_request() -> None:
    found = limits([Workload("a", 4, 16, 1, 16), Workload("b", 1, 0, 100, 1)])
    assert found == Limits(requests=4, longest=101, tokens=4 * (3 + 1) * 16)  # 33 tokens are 3 blocks, and one to spare


def test_shared_prefix_is_counted_in_tokens() -> None:
    assert shared_tokens([([1, 2, 3], 1), ([1, 2, 4], 1), ([1, 2], 1)]) == 2
    assert shared_tokens([([1, 2, 3], 1)]) == 0
    assert shared_tokens(WORKLOADS["prefix32"].draw(0, 7000)) == 512


def test_vocabulary_is_the_text_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "text_config": {"vocab_size": 7}}')
    assert vocabulary(tmp_path) == 7


def test_rate_is_tokens_over_the_median_time() -> None:
    found = rate("x", [([1] * 30, 5), ([1] * 10, 15)], [4.0, 2.0, 9.0])
    assert (found["seconds"], found["output_tok_s"], found["total_tok_s"]) == (4.0, 5.0, 15.0)
    assert (found["requests"], found["prompt_tokens"], found["output_tokens"]) == (2, 40, 20)

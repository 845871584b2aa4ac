"""Peers from the command line and from a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from harness.compared_engines import BadPeer, from_file, from_option, own_engines
from harness.runs import rotated

EXAMPLE = Path(__file__).parents[3] / "benchmarks" / "peers" / "peers.toml"


def test_peer_on_the_command_line_is_a_kind_and_a_python() -> None:
    peer = from_option("openvino-int8=/v/bin/python,/models/ov")
    assert (peer.name, peer.python, peer.model, peer.precision) == (
        "openvino-int8",
        "/v/bin/python",
        "/models/ov",
        "int8",
    )
    assert peer.command("/models/m", ["single", "8x4+2"], 3)[2:] == [
        *("/models/ov", "--workloads", "single,8x4+2", "--repeats", "3", "--hint", "f32")
    ]


def test_peer_without_a_model_of_its_own_gets_the_common_one() -> None:
    assert from_option("vllm=python").command("/models/m", ["single"], 1)[2] == "/models/m"


@pytest.mark.parametrize("text", ["vllm", "vllm=", "nobody=python"])
def test_peer_that_cannot_be_understood_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        from_option(text)


def test_example_file_names_every_engine() -> None:
    peers = from_file(EXAMPLE)
    assert {peer.script for peer in peers} == {
        *("run_transformers.py", "run_vllm.py", "run_openvino.py", "run_llamacpp.py")
    }


def test_table_may_have_any_name_with_a_kind(tmp_path: Path) -> None:
    file = tmp_path / "peers.toml"
    file.write_text('[one-core]\nkind = "vllm"\npython = "p"\nargs = ["--cache-gib", 2]\nenv = { A = "1" }\n')
    (peer,) = from_file(file)
    assert (peer.name, peer.script, peer.args) == ("one-core", "run_vllm.py", ("--cache-gib", "2"))
    assert peer.environment()["A"] == "1"
    assert "PYTHONPATH" not in peer.environment()


@pytest.mark.parametrize("text", ["[vllm]\n", "[other]\npython = 'p'\n", "[vllm]\npython = 'p'\nspeed = 9\n", "[["])
def test_bad_file_says_what_to_write(tmp_path: Path, text: str) -> None:
    file = tmp_path / "peers.toml"
    file.write_text(text)
    with pytest.raises(BadPeer):
        from_file(file)


def test_absent_peers_are_told_from_present_ones(tmp_path: Path) -> None:
    assert from_option(f"vllm={sys.executable}").missing() is None
    assert from_option("vllm=/nowhere/python").missing() == "there is no /nowhere/python"
    assert from_option(f"openvino={sys.executable},{tmp_path / 'no'}").missing() is not None


def test_own_engine_runs_in_each_precision_with_the_same_settings() -> None:
    plain, quantized = own_engines(["penstock-bf16", "penstock-int8"], ["block_size=32"])
    assert plain.args == ("--set", "block_size=32")
    assert quantized.args == ("--quantization", "int8", "--set", "block_size=32")


def test_each_run_starts_with_another_engine() -> None:
    a, b, c = (from_option(f"{kind}=python") for kind in ("vllm", "openvino", "llamacpp"))
    assert [rotated([a, b, c], run)[0] for run in range(4)] == [a, b, c, a]
    assert rotated([], 1) == []

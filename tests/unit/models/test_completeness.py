"""A checkpoint that lacks tensors of its model is refused, with their names and the likely cause."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.cli.command import main
from penstock.config import EngineConfig
from penstock.errors import ConfigurationError
from penstock.models.completeness import grouped
from penstock.models.loading import load, load_draft
from tests.tiny_models import build

IDS_ONLY = EngineConfig(skip_tokenizer_init=True)
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]


def without(part: str) -> Change:
    """Drop all tensors that have `part` in their names."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def prefixed(prefix: str) -> Change:
    """Begin every name with `prefix`."""
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def compiled_layers(tensors: Tensors) -> Tensors:
    """The names of a module whose layers were compiled one by one."""
    return {name.replace("self_attn.", "self_attn._orig_mod."): tensor for name, tensor in tensors.items()}


def resized(tensors: Tensors) -> Tensors:
    """A vocabulary with eight more tokens."""
    larger = torch.zeros(168, 32)
    return tensors | {"model.embed_tokens.weight": larger, "lm_head.weight": larger.clone()}


def change_file(folder: Path, change: Change) -> Path:
    """Rewrite the weights of a saved model."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def saved(folder: Path, change: Change, name: str = "llama", **settings: Any) -> Path:
    """A folder with a model whose weights were changed on disk."""
    build(name, **settings).save_pretrained(folder)
    return change_file(folder, change)


CASES: dict[str, tuple[Change, str]] = {
    "weights of a layer": (
        without("layers.1.mlp."),
        r"lacks 3 tensors .*\(model.layers.1.mlp.down_proj.weight, .*Likely cause: an interrupted save",
    ),
    "a norm": (without("model.norm."), r"lacks 1 tensor of its model \(model.norm.weight\)"),
    "the embedding": (without("embed_tokens"), r"lacks 1 tensor of its model \(model.embed_tokens.weight\)"),
    "an untied head": (without("lm_head"), r"lm_head.weight\).*tie_word_embeddings=false"),
    "all names prefixed": (prefixed("_orig_mod."), r"lacks 21 tensors.* and 18 more\).*'_orig_mod.' .*torch.compile"),
    "a wrapper's prefix": (prefixed("module."), r"'module.' .*DataParallel"),
    "an unknown prefix": (prefixed("policy.net."), r"'policy.net.' added: rename"),
    "a wrapper inside": (compiled_layers, r"'_orig_mod.' .*torch.compile"),
    "another shape": (
        resized,
        r"2 tensors of another shape \(lm_head.weight is \[168, 32\] in the file and \[160, 32\] in the model; .*",
    ),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES)
def test_a_checkpoint_that_lacks_tensors_is_refused_with_their_names_and_the_cause(
    change: Change, message: str, tmp_path: Path
) -> None:
    """It was served with random weights in place of the missing ones, different at each load."""
    with pytest.raises(ConfigurationError, match=message):
        load(saved(tmp_path, change, tie_word_embeddings=False), None, IDS_ONLY)


@pytest.mark.parametrize(("change", "message"), [CASES["weights of a layer"], CASES["an untied head"]])
def test_a_checkpoint_left_to_from_pretrained_is_refused_in_the_same_way(
    change: Change, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("of no known kind")

    monkeypatch.setattr("penstock.models.reading.fetch", fail)
    with pytest.raises(ConfigurationError, match=message):
        load(saved(tmp_path, change, tie_word_embeddings=False), None, IDS_ONLY)


def test_a_draft_model_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    spec = load(build("llama"), None, IDS_ONLY).runner.spec
    with pytest.raises(ConfigurationError, match="lacks 1 tensor"):
        load_draft(str(saved(tmp_path, without("model.norm."))), spec, IDS_ONLY)


def test_the_command_line_refuses_it_in_one_line_and_with_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code was 0, and the text random."""
    folder = saved(tmp_path, without("model.norm."))
    (folder / "tokenizer.json").write_text("{}")
    assert main(["generate", "--model", str(folder), "Hello"]) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if "lacks 1 tensor" in line] == lines[-1:]
    assert "Traceback" not in "".join(lines)


def test_all_missing_tensors_are_notes_of_the_error_and_lines_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names three of them; transformers' report of the others was silenced."""
    folder = saved(tmp_path, without(".mlp."))
    with pytest.raises(ConfigurationError, match="and 3 more") as raised:
        load(folder, None, IDS_ONLY)
    report = [
        "  in the model, not in the file:",
        "    model.layers.{0-1}.mlp.down_proj.weight",
        "    model.layers.{0-1}.mlp.gate_proj.weight",
        "    model.layers.{0-1}.mlp.up_proj.weight",
    ]
    assert raised.value.__notes__ == ["\n".join(report)]
    (folder / "tokenizer.json").write_text("{}")
    assert main(["generate", "--model", str(folder), "Hello"]) == 2
    assert capsys.readouterr().err.splitlines()[-4:] == report


def test_names_that_differ_only_in_their_layer_are_one_line() -> None:
    names = [f"layers.{number}.norm.weight" for number in (0, 1, 2, 5, 10, 11)]
    assert grouped([*names, "layers.3.bias", "head.weight"]) == [
        "head.weight",
        "layers.3.bias",
        "layers.{0-2,5,10-11}.norm.weight",
    ]


def test_a_tied_head_may_be_absent(tmp_path: Path) -> None:
    folder = saved(tmp_path, without("lm_head"), tie_word_embeddings=True)
    assert load(folder, None, IDS_ONLY).runner.spec.vocab_size == 160


def test_a_tied_model_without_either_of_its_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"lacks 2 tensors .*lm_head.weight, model.embed_tokens"):
        load(saved(tmp_path, without("embed_tokens"), tie_word_embeddings=True), None, IDS_ONLY)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    """The experts of a layer become one tensor, which a missing one makes smaller."""
    with pytest.raises(ConfigurationError, match=r"experts"):
        load(saved(tmp_path, without("experts.2."), "mixtral"), None, IDS_ONLY)


def test_extra_tensors_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, lambda tensors: tensors | {"value_head.weight": torch.zeros(1, 32)})
    with caplog.at_level(logging.WARNING, logger="penstock"):
        load(folder, None, IDS_ONLY)
    assert [record.getMessage() for record in caplog.records if record.name == "penstock"] == [
        f"the checkpoint {folder} holds 1 tensor that its model has no place for (value_head.weight): they are not used"
    ]


def test_unused_tensors_of_old_checkpoints_cause_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unused = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    folder = saved(tmp_path, lambda tensors: tensors | unused)
    with caplog.at_level(logging.WARNING, logger="penstock"):
        load(folder, None, IDS_ONLY)
    assert not [record for record in caplog.records if record.name == "penstock"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ConfigurationError, match=rf"lacks 1 of its {len(shards)} weight files .{shards[1].name}"):
        load(tmp_path, None, IDS_ONLY)

"""Reading a checkpoint: the module that `from_pretrained` gives, without touching anything of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from penstock.config import EngineConfig
from penstock.models.reading import read_module
from tests.tiny_models import ARCHITECTURES, build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def no_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and `from_pretrained` fails from then on: what still loads was built by us."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("from_pretrained was called")

    return lambda: monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def assert_same_module(module: nn.Module, reference: Any) -> None:
    """Same class, config, and bits of every parameter and buffer, those that no file holds included; same ties."""
    assert type(module) is type(reference)
    assert not module.training
    assert module.config.to_dict() == reference.config.to_dict()  # type: ignore[operator, union-attr]
    assert module.generation_config.to_dict() == reference.generation_config.to_dict()  # type: ignore[operator, union-attr]
    for kind in ("named_parameters", "named_buffers"):
        ours = dict(getattr(module, kind)(remove_duplicate=False))
        theirs = dict(getattr(reference, kind)(remove_duplicate=False))
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
            assert tensor.requires_grad == theirs[name].requires_grad, name
    assert len(list(module.parameters())) == len(list(reference.parameters()))


@pytest.mark.parametrize("dtype", [*DTYPES, "auto"], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_module_built_here_is_bit_for_bit_that_of_from_pretrained(
    name: str, dtype: torch.dtype | str, tmp_path: Path, no_from_pretrained: Callable[[], None]
) -> None:
    build(name).to(torch.bfloat16 if dtype == "auto" else torch.float32).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    no_from_pretrained()
    assert_same_module(read_module(str(tmp_path), dtype, EngineConfig()), reference)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "gpt_neox"])
def test_tied_and_untied_heads_are_those_of_from_pretrained(
    name: str, tied: bool, tmp_path: Path, no_from_pretrained: Callable[[], None]
) -> None:
    build(name, tie_word_embeddings=tied).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    no_from_pretrained()
    assert_same_module(read_module(str(tmp_path), torch.float32, EngineConfig()), reference)


def as_shards(model: PreTrainedModel, folder: Path) -> None:
    """Several safetensors files and their index."""
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def as_pickle(model: PreTrainedModel, folder: Path) -> None:
    """`pytorch_model.bin`, which holds both names of a tied weight."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_base_model(model: PreTrainedModel, folder: Path) -> None:
    """Names without the prefix of the base model, as old checkpoints have them."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = f"{model.base_model_prefix}."
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def with_one_half_of_a_tie(model: PreTrainedModel, folder: Path) -> None:
    """A tied weight under the head's name only."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors.pop(embedding)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("save", [as_shards, as_pickle, as_base_model, with_one_half_of_a_tie])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_layout_of_files_is_read_as_from_pretrained_reads_it(
    name: str,
    save: Callable[[Any, Path], None],
    tmp_path: Path,
    no_from_pretrained: Callable[[], None],
) -> None:
    save(build(name, tie_word_embeddings=True), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    no_from_pretrained()
    assert_same_module(read_module(str(tmp_path), torch.float32, EngineConfig()), reference)

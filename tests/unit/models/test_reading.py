"""Reading a checkpoint gives the module of `from_pretrained`, and changes nothing process-wide."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from penstock.config import EngineConfig
from penstock.models.loading import load
from penstock.models.origin import Origin
from penstock.models.reading import read_module
from tests.tiny_models import ARCHITECTURES, LLAMA, build

REGISTER = nn.Module.register_parameter
DTYPES = (torch.float32, torch.bfloat16, torch.float16, "auto")


@pytest.fixture
def no_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after whose call `from_pretrained` fails: what still loads was built here."""

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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_module_built_here_is_bit_for_bit_that_of_from_pretrained(
    name: str, tmp_path: Path, no_from_pretrained: Callable[[], None]
) -> None:
    build(name).to(torch.bfloat16).save_pretrained(tmp_path)
    references = {dtype: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype) for dtype in DTYPES}
    no_from_pretrained()
    for dtype, reference in references.items():
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


def lazy(*args: Any, **options: Any) -> None:
    """Like the functions that other loaders install while they load."""


def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Registers parameters as `init_empty_weights` of accelerate does."""
    REGISTER(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))


@contextmanager
def another_load(patch: pytest.MonkeyPatch, dtype: torch.dtype) -> Iterator[None]:
    """The process as loaders leave it in the middle of a load."""
    before = torch.get_default_dtype()
    with patch.context() as swap:
        for function in ("tie_weights", "init_weights"):
            swap.setattr(PreTrainedModel, function, lazy)
        for function in ("normal_", "uniform_", "kaiming_uniform_", "ones_", "zeros_", "constant_"):
            swap.setattr(nn.init, function, lazy)
        swap.setattr(nn.Module, "register_parameter", to_meta)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text", "gpt_oss", "phi3"])
def test_another_load_of_the_process_changes_nothing(
    name: str, other: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loads at once failed with "Cannot copy out of meta tensor", as did every load of the process afterwards."""
    build(name, tie_word_embeddings=True).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with another_load(monkeypatch, other):
        module = read_module(str(tmp_path), torch.float32, EngineConfig())
        load(tmp_path, None, EngineConfig(dtype="float32", skip_tokenizer_init=True))
    assert_same_module(module, reference)


def state_of_the_process() -> tuple[Any, ...]:
    """What a program may read in another thread during a load."""
    functions = (nn.init.normal_, nn.init.zeros_, torch.linspace, nn.Module.register_parameter)
    methods = (PreTrainedModel.tie_weights, PreTrainedModel.init_weights, logging.is_progress_bar_enabled())
    return (torch.zeros(1).dtype, torch.zeros(1).device, torch.is_grad_enabled(), *functions, *methods)


def test_loading_does_not_affect_other_threads(tmp_path: Path) -> None:
    """In one of a hundred calls, the program's own `torch.zeros(1)` was bfloat16 while an engine loaded."""
    build("llama", num_hidden_layers=12, dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = EngineConfig(skip_tokenizer_init=True, dtype="bfloat16")
    load(tmp_path, None, config)
    before, random_state = state_of_the_process(), torch.get_rng_state()
    loading = threading.Thread(target=load, args=(tmp_path, None, config))
    loading.start()
    looks = []
    while loading.is_alive():
        looks.append(state_of_the_process())
    assert set(looks) == {before}
    assert torch.equal(torch.get_rng_state(), random_state)


def test_loading_never_sets_a_default_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch, "set_default_dtype", calls.append)
    monkeypatch.setattr(torch, "set_default_device", calls.append)
    build("llama").save_pretrained(tmp_path)
    calls.clear()
    load(tmp_path, None, EngineConfig(skip_tokenizer_init=True, dtype="bfloat16"))
    assert calls == []


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gpt_oss"])
def test_trial_passes_do_not_depend_on_the_default_dtype(name: str, default: torch.dtype) -> None:
    """Buffers that C writes to had the process's default dtype: it wrote beyond their end."""
    model = build(name)
    expected = load(model, None, EngineConfig(skip_tokenizer_init=True)).runner.spec
    torch.set_default_dtype(default)
    try:
        assert load(model, None, EngineConfig(skip_tokenizer_init=True)).runner.spec == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_hub_snapshot_is_read_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_from_pretrained: Callable[[], None]
) -> None:
    snapshot = tmp_path / "models--some--llama" / "snapshots" / ("a" * 40)
    build("llama").save_pretrained(snapshot)
    (tmp_path / "models--some--llama" / "refs").mkdir()
    (tmp_path / "models--some--llama" / "refs" / "main").write_text("a" * 40)
    reference = AutoModelForCausalLM.from_pretrained("some/llama", cache_dir=tmp_path)
    no_from_pretrained()
    config = EngineConfig(download_dir=str(tmp_path))
    assert_same_module(read_module("some/llama", "auto", config), reference)


def test_weights_from_the_hub_are_read_again_at_the_commit_that_was_loaded(tmp_path: Path) -> None:
    """A branch that went on meanwhile would give a sleeping engine the weights of another commit."""
    repository = tmp_path / "models--some--llama"
    first, second = build("llama").eval(), build("llama", hidden_size=16).eval()
    for number, model in enumerate((first, second)):
        model.save_pretrained(repository / "snapshots" / (str(number) * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    config = EngineConfig(download_dir=str(tmp_path))
    origin = Origin("some/llama", config)
    (repository / "refs" / "main").write_text("1" * 40)
    assert origin.read_again().config.hidden_size == first.config.hidden_size
    assert read_module("some/llama", "auto", config).config.hidden_size == second.config.hidden_size


class OtherConfig(LlamaConfig):
    """A kind of model that the program defines."""

    model_type = "llama_of_the_tests"


class OtherLlama(LlamaForCausalLM):
    """Its class, which may initialise in ways of its own."""

    config_class = OtherConfig


@pytest.fixture
def other_llama(tmp_path: Path) -> Path:
    """A saved model of the program's own class."""
    AutoConfig.register(OtherConfig.model_type, OtherConfig, exist_ok=True)
    AutoModelForCausalLM.register(OtherConfig, OtherLlama, exist_ok=True)
    OtherLlama(OtherConfig(**LLAMA)).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_class_that_the_program_registered_is_left_to_from_pretrained(other_llama: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(other_llama, dtype=torch.bfloat16)
    assert type(reference) is OtherLlama
    assert_same_module(read_module(str(other_llama), torch.bfloat16, EngineConfig()), reference)


def test_what_is_left_to_from_pretrained_is_loaded_one_at_a_time(other_llama: Path) -> None:
    """Two at once left `PreTrainedModel.tie_weights` replaced for good."""
    before = state_of_the_process()
    with ThreadPoolExecutor(4) as pool:
        dtypes = [torch.float32, torch.bfloat16] * 6
        modules = list(pool.map(lambda dtype: read_module(str(other_llama), dtype, EngineConfig()), dtypes))
    assert [next(module.parameters()).dtype for module in modules] == dtypes
    assert state_of_the_process() == before


def test_a_parameter_that_may_be_missing_stays_a_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_from_pretrained: Callable[[], None]
) -> None:
    """It became a plain tensor among the parameters, which `get_parameter` refuses."""
    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", ["lm_head.weight"])
    no_from_pretrained()
    module = read_module(str(tmp_path), torch.float32, EngineConfig())
    assert module.get_parameter("lm_head.weight").isfinite().all()

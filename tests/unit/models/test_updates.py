"""New values for the weights of a module: everything that can be checked is checked before the first is written."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.errors import WeightsError
from penstock.models.updates import copy_into, named_weights, read_source, write
from tests.tiny_models import build


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in named_weights(model).items()}


def changed(model: nn.Module, amount: float = 1.0) -> dict[str, Tensor]:
    """The weights with something added; tied ones stay tied."""
    return {name: tensor + amount for name, tensor in values_of(model).items()}


def is_equal(model: nn.Module, values: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, values[name]) for name, tensor in named_weights(model).items())


def update(model: nn.Module, source: Any) -> set[str]:
    """Read, then write, as an engine does."""
    weights = named_weights(model)
    return write(weights, read_source(weights, source), copy_into)  # type: ignore[arg-type]


class WithBuffers(nn.Module):
    """A parameter under two names, a buffer of checkpoints, and a derived one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("derived", torch.ones(2), persistent=False)
        self.register_buffer("count", torch.tensor(3))


class Unreadable(UserDict[str, Tensor]):
    """State that somebody else stores."""

    def items(self) -> Any:
        raise OSError("the disk is gone")


def test_weights_are_parameters_and_buffers_of_checkpoints_under_every_name() -> None:
    model = WithBuffers()
    assert named_weights(model).keys() == model.state_dict().keys()
    assert named_weights(model)["second.weight"] is model.first.weight


@pytest.mark.parametrize("kind", ["mapping", "pairs", "iterator"])
def test_named_tensors_are_written_in_place(kind: str) -> None:
    model = build("llama")
    places = {name: tensor.data_ptr() for name, tensor in named_weights(model).items()}
    values = changed(model)
    sources = {"mapping": values, "pairs": list(values.items()), "iterator": iter(values.items())}
    assert update(model, sources[kind]) == values.keys()
    assert is_equal(model, values)
    assert {name: tensor.data_ptr() for name, tensor in named_weights(model).items()} == places
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_weights_that_a_source_does_not_name_stay() -> None:
    model = build("llama")
    values = values_of(model)
    values["model.norm.weight"] += 1
    assert update(model, {"model.norm.weight": values["model.norm.weight"]}) == {"model.norm.weight"}
    assert is_equal(model, values)


def test_values_are_converted_to_the_dtype_of_the_model() -> None:
    model = build("llama").to(torch.bfloat16)
    values = {name: tensor.float() + 1 for name, tensor in values_of(model).items()}
    update(model, values)
    assert is_equal(model, {name: tensor.to(torch.bfloat16) for name, tensor in values.items()})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"model.norm.weights": torch.ones(32)}, "no weight 'model.norm.weights'"),
        ({"model.norm.weight": torch.ones(31)}, r"the shape \[31\], and \[32\] in the model"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int64)}, "convert it first"),
        ({"model.norm.weight": [1.0] * 32}, "is a list: pass tensors"),
        ({"model.norm.weight": torch.ones(32, device="meta")}, "meta device"),
        ({"model.norm.weight": torch.ones(32).to_sparse()}, "not a dense tensor"),
        (Unreadable(), "cannot be read: OSError: the disk is gone"),
        ([torch.ones(32)], "pairs of a name and a tensor"),
        ([("model.norm.weight",)], "pairs of a name and a tensor"),
        (3, "cannot come from a int"),
        ("no/such/folder", "no folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(source: Any, message: str) -> None:
    model = build("llama")
    values = values_of(model)
    if type(source) is dict:
        source = {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32)} | source  # the first would fit
    with pytest.raises(WeightsError, match=message) as caught:
        update(model, source)
    assert not caught.value.is_mixed
    assert is_equal(model, values)


def test_tied_weights_get_one_value() -> None:
    model = WithBuffers()
    update(model, {"first.weight": torch.eye(2), "second.weight": torch.eye(2)})
    with pytest.raises(WeightsError, match=r"first\.weight and second\.weight are one tensor"):
        update(model, {"first.weight": torch.eye(2), "second.weight": torch.zeros(2, 2)})
    assert torch.equal(model.first.weight, torch.eye(2))
    update(model, {name: torch.full((2, 2), torch.nan) for name in ("first.weight", "second.weight")})
    assert bool(model.first.weight.isnan().all())


def failing(values: dict[str, Tensor], count: int, error: Any) -> Iterator[tuple[str, Any]]:
    """So many pairs, and then an error or a bad pair."""
    yield from list(values.items())[:count]
    if isinstance(error, Exception):
        raise error
    yield error


@pytest.mark.parametrize("error", [ValueError("the gatherer failed"), ("no.such.name", torch.ones(1)), 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_iterator_that_fails_says_whether_weights_are_mixed(count: int, error: Any) -> None:
    model = build("llama")
    values = values_of(model)
    with pytest.raises(WeightsError, match="close the engine" if count else "nothing was written") as caught:
        update(model, failing(changed(model), count, error))
    assert caught.value.is_mixed == (count > 0)
    assert is_equal(model, values) == (count == 0)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_folder_is_read_by_the_names_of_the_module(name: str, tmp_path: Path) -> None:
    """Files of some architectures use other names, and those of tied heads lack one."""
    model, other = build(name), build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.25)
    other.save_pretrained(tmp_path)  # type: ignore[operator]
    assert update(model, tmp_path) == values_of(model).keys()
    assert is_equal(model, values_of(other))


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    values = values_of(model)
    build("llama", num_hidden_layers=1).save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(WeightsError, match=r"lacks weights of the model \(model\.layers\.1"):
        update(model, tmp_path)
    build("qwen3").save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(WeightsError, match="no weight"):
        update(model, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(WeightsError, match="corrupt"):
        update(model, tmp_path)
    assert is_equal(model, values)


def test_a_first_tensor_without_values_mixes_nothing() -> None:
    """An iterator's was found out while it was written, and the engine had to be closed for it."""
    model = build("llama")
    before = values_of(model)
    pairs = iter([("model.norm.weight", torch.ones(32, device="meta"))])
    with pytest.raises(WeightsError, match="on the meta device and has no values; nothing was written") as caught:
        update(model, pairs)
    assert not caught.value.is_mixed
    assert is_equal(model, before)

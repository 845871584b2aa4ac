"""New values for the weights of a module: `named_weights`, `read_source`, `write`.

Everything that can be checked is checked before the first tensor is written. Writes in place, so that whoever shares
the tensors sees the new values. Called by `ModelWeights` on the model's thread, between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from penstock.api.weights import WeightSource
from penstock.config import EngineConfig
from penstock.errors import WeightsError, described, shown
from penstock.models.completeness import listed
from penstock.models.origin import Origin
from penstock.models.wrappers import unwrapped_name

Weights = Mapping[str, Tensor]
Put = Callable[[str, Tensor, Tensor], None]  # name, place, new value


class FolderWeights(dict[str, Tensor]):
    """Every weight of a model, as a folder has them that can be read again."""

    def __init__(self, weights: Weights, origin: Origin) -> None:
        super().__init__(weights)
        self.origin = origin


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under each of its names; tied ones appear under several."""
    weights: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            if name not in part._non_persistent_buffers_set:
                weights[f"{prefix}.{name}" if prefix else name] = buffer
    return weights


def read_source(weights: Weights, source: WeightSource) -> WeightSource:
    """Check a source, and read its files if it has any; returns what to `write`.

    Reads nothing of an iterator, whose tensors are checked as they come. Raises `WeightsError` for names, shapes or
    types that do not fit.
    """
    if isinstance(source, str | PathLike):
        return _read_folder(weights, Path(source))
    if isinstance(source, list | tuple):
        source = dict(map(_pair, source))
    if isinstance(source, Mapping):
        try:
            _check_all(weights, source)
        except WeightsError:
            raise
        except Exception as error:  # by a mapping or a tensor of another library
            raise WeightsError(f"the new weights cannot be read: {described(error)}") from error
    elif source is not None and not isinstance(source, Iterable):
        raise WeightsError(
            f"weights cannot come from a {type(source).__name__}: pass a state dict, a folder of safetensors, "
            "(name, tensor) pairs, or nothing for the live module"
        )
    return source


def copy_into(name: str, place: Tensor, value: Tensor) -> None:
    """Write a weight where it is."""
    with torch.no_grad():
        place.copy_(value)


def write(weights: Weights, source: Mapping[str, object] | Iterable[tuple[str, object]], put: Put) -> set[str]:
    """Write the tensors of a source that was read, each with `put`; their names in `weights`. Others stay as they are.

    Raises `WeightsError`: with `is_mixed` once a tensor has been written, since the others have their old values.
    """
    names: set[str] = set()
    try:
        for name, tensor in map(_pair, source.items() if isinstance(source, Mapping) else source):
            place_name = _checked(weights, name, tensor)
            names.add(place_name)
            put(place_name, weights[place_name], tensor)
    except Exception as error:
        raise _write_error(error, len(names)) from error
    return names


def _pair(pair: object) -> tuple[str, Tensor]:
    match pair:
        case (str(name), Tensor() as tensor):
            return name, tensor
        case (str(name), value):
            raise WeightsError(f"{name} is a {type(value).__name__}: pass tensors")
    raise WeightsError(f"weights are pairs of a name and a tensor, got a {type(pair).__name__}")


def _checked(weights: Weights, name: str, tensor: Tensor) -> str:
    """The name, without any wrapper, of the weight that is to get these values. Raises `WeightsError`."""
    place_name = name if name in weights else unwrapped_name(name)
    target = weights.get(place_name)
    if target is None:
        raise WeightsError(f"the model has no weight {shown(name)}: names are those of the module's state_dict()")
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise WeightsError(f"{name} is not a dense tensor: convert it first")
    if target.shape != tensor.shape:
        raise WeightsError(f"{name} has the shape {list(tensor.shape)}, and {list(target.shape)} in the model")
    if target.dtype != tensor.dtype and not (target.is_floating_point() and tensor.is_floating_point()):
        raise WeightsError(f"{name} is {tensor.dtype}, and {target.dtype} in the model: convert it first")
    if tensor.is_meta:
        raise WeightsError(f"{name} is on the meta device and has no values")
    return place_name


def _check_all(weights: Weights, named: Mapping[str, object]) -> None:
    """Check all tensors of a mapping, also that tied weights get one value."""
    values: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in map(_pair, named.items()):
        target = weights[_checked(weights, name, tensor)]
        earlier_name, value = values.setdefault(target.data_ptr() or id(target), (name, tensor))
        if value.data_ptr() != tensor.data_ptr() and not _are_equal(value.to(tensor), tensor):
            raise WeightsError(f"{earlier_name} and {name} are one tensor in the model, and differ in the source")


def _are_equal(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same numbers, NaN being one of them."""
    return torch.equal(value, other) or torch.allclose(value, other, rtol=0, atol=0, equal_nan=True)


def _read_folder(weights: Weights, folder: Path) -> FolderWeights:
    """The tensors of a folder that `save_pretrained` wrote, under the module's names; those of every weight."""
    if not folder.is_dir():
        raise WeightsError(f"there is no folder {folder}: pass one with config.json and safetensors")
    origin = Origin(str(folder), EngineConfig(load_format="safetensors"))
    named = named_weights(origin.read())
    if missing := weights.keys() - named.keys():
        raise WeightsError(f"{folder} lacks weights of the model ({listed(missing)}): it holds another model's")
    _check_all(weights, named)
    return FolderWeights(named, origin)


def _write_error(error: Exception, num_written: int) -> WeightsError:
    reason = str(error) if isinstance(error, WeightsError) else f"writing the weights failed: {described(error)}"
    if not num_written:
        return WeightsError(f"{reason}; nothing was written")
    tensors = f"{num_written} tensor{'s' if num_written > 1 else ''}"
    return WeightsError(
        f"{reason}; {tensors} had been written already, so old and new weights are mixed: close the engine",
        is_mixed=True,
    )

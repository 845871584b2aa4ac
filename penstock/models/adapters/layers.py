"""The linear layers of a model that adapters change, by the names that they have in the base model.

Pure functions over a module, which they never change. Called by the stores of adapters.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from penstock.errors import ConfigurationError, WeightsError
from penstock.models.adapters.reading import LoraLayer, adapter_layers, plain_name


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """All parts of a model."""
    return {plain_name(path): part for path, part in module.named_modules()}


def head_of(module: nn.Module) -> set[str]:
    """The names of the output head."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    return {plain_name(path) for path, part in module.named_modules() if part is head}


def shape_of(module: nn.Module | None) -> tuple[int, int] | None:
    """The numbers of inputs and outputs of a linear layer; None for anything else."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(module, name, None) for name in names]
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    return None


def check_fits(path: str, matrices: LoraLayer, shape: tuple[int, int] | None) -> None:
    """Raise `WeightsError` where matrices do not fit a layer of this shape (inputs, outputs), None if there is none."""
    if shape is None:
        raise WeightsError(f"the model has no linear layer {path} of its own weights, and the adapter changes it")
    if (sizes := (matrices.a.shape[1], len(matrices.b))) != shape:
        raise WeightsError(f"{path} maps {shape[0]} numbers to {shape[1]}; in the adapter, {sizes[0]} to {sizes[1]}")


def own_adapters_of(module: nn.Module) -> str | None:
    """What to change where a live module applies an adapter of its own; None where it does not."""
    for path, part in adapter_layers(module):
        if part.merged_adapters or not part._disable_adapters:
            return (
                f"the borrowed module applies an adapter of its own to every request ({path}): lend the engine the "
                "base model, or call disable_adapter_layers() on it"
            )
    return None


def hooked_layers(view: nn.Module, paths: Collection[str]) -> dict[str, nn.Module]:
    """The layers of a view that replaces another one, for adapters that are loaded. Raises `ConfigurationError`."""
    if paths and (problem := own_adapters_of(view)) is not None:
        raise ConfigurationError(problem)
    layers = layers_of(view)
    if missing := [path for path in paths if path not in layers]:
        raise ConfigurationError(f"it has no layer {missing[0]} any more, which a loaded adapter changes: unload that")
    return {path: layers[path] for path in paths}

"""`LoraAdapter`: the matrices of one adapter, and the hooks that apply them to a view of the base module.

Owns which layers an adapter changes. Never touches a weight of the base module. Used by `LoraModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.errors import RequestError, WeightsError
from penstock.models.adapters.layers import shape_of
from penstock.training.lora.records import LORA_ALPHA, LoraShape

PREFIX = "base_model.model."  # of names in the files of peft
_ROUTERS = frozenset({"gate", "router"})  # they choose experts


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The matrices of a layer from K to N numbers, float32: a [r, K] and b [N, r]; they add scaling * b a x to b0 x."""

    a: Tensor
    b: Tensor


class LoraAdapter:
    """An adapter of `module`; its a is random, its b zero. Raises `RequestError` where `shape` fits no layer."""

    def __init__(self, module: PreTrainedModel, shape: LoraShape) -> None:
        self.shape = shape
        self.scaling = LORA_ALPHA / shape.rank
        generator = torch.Generator()
        generator.seed() if shape.seed is None else generator.manual_seed(shape.seed)
        self.layers = {
            path: _initialized(part, shape.rank, generator) for path, part in target_layers(module, shape).items()
        }
        if not self.layers:
            raise RequestError(
                f"{type(module).__name__} has no linear layer of the kinds that the adapter is to change"
            )

    def parameters(self) -> list[Tensor]:
        """All matrices, the two of a layer after each other."""
        return [matrix for layer in self.layers.values() for matrix in (layer.a, layer.b)]

    def attach(self, view: nn.Module) -> None:
        """Apply the adapter to a view of the module."""
        for path, layer in self.layers.items():
            view.get_submodule(path).register_forward_hook(self._hook(layer))

    def tensors(self) -> dict[str, Tensor]:
        """The matrices by the names that peft gives them, not copied."""
        pairs = self.layers.items()
        return {
            f"{PREFIX}{path}.lora_{kind}.weight": getattr(layer, kind.lower()) for path, layer in pairs for kind in "AB"
        }

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy matrices of these names. Raises `WeightsError`, and then nothing has changed."""
        matrices = {name: matrix.detach() for name, matrix in self.tensors().items()}
        if matrices.keys() != tensors.keys():
            raise WeightsError("the saved adapter changes other layers than this one")
        for name, matrix in matrices.items():
            if tensors[name].shape != matrix.shape:
                raise WeightsError(f"{name} is {list(matrix.shape)} here, and {list(tensors[name].shape)} in the file")
            if not bool(tensors[name].isfinite().all()):
                raise WeightsError(f"{name} is not finite in the file")
        for name, matrix in matrices.items():
            matrix.copy_(tensors[name])

    def _hook(self, layer: LowRank) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        scaling = self.scaling

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inner = inputs[0].float() @ layer.a.T
            return (output.float() + (inner @ layer.b.T) * scaling).to(output.dtype)

        return add


def target_layers(module: PreTrainedModel, shape: LoraShape) -> dict[str, nn.Module]:
    """The linear layers that an adapter changes, by path."""
    head = module.get_output_embeddings()
    layers: dict[str, nn.Module] = {}
    attention: set[nn.Module] = set()
    for path, part in module.named_modules():
        if "Attention" in type(part).__name__:
            attention.update(part.modules())
        if shape_of(part) is None or path.rpartition(".")[2] in _ROUTERS:
            continue
        is_wanted = shape.train_attn if part in attention else shape.train_mlp
        if shape.train_unembed if part is head else is_wanted:
            layers[path] = part
    return layers


def num_parameters(module: PreTrainedModel, shape: LoraShape) -> int:
    """How many numbers the matrices of an adapter have."""
    sizes = [shape_of(part) or (0, 0) for part in target_layers(module, shape).values()]
    return shape.rank * sum(inputs + outputs for inputs, outputs in sizes)


def _initialized(part: nn.Module, rank: int, generator: torch.Generator) -> LowRank:
    sizes = shape_of(part)
    assert sizes is not None
    device = next(part.parameters()).device
    bound = 1 / math.sqrt(sizes[0])  # as a linear layer's own weight
    a = torch.empty(rank, sizes[0], dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    b = torch.zeros(sizes[1], rank, dtype=torch.float32, device=device)
    return LowRank(a.to(device).requires_grad_(), b.requires_grad_())

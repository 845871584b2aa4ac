"""Conversions for a module whose embedding or head has another dtype than its layers.

Trainers compute the head in float32 and convert what it takes in hooks and replaced forward methods, which a view
leaves out. Called by `borrow` for every view.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn


class _ConvertOutput:
    """A forward hook."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(self._dtype)


def convert_between_dtypes(view: nn.Module) -> None:
    """Have the head convert what it takes to its own dtype, and the embedding what it returns to that of the layers."""
    embedding, head = (_part(view, name) for name in ("get_input_embeddings", "get_output_embeddings"))
    outer = {id(part.weight) for part in (embedding, head) if part is not None}
    inner = [parameter for parameter in view.parameters() if id(parameter) not in outer]
    dtypes = Counter(parameter.dtype for parameter in inner if parameter.is_floating_point())
    if not dtypes:
        return
    ((dtype, _),) = dtypes.most_common(1)
    if head is not None and head.weight.dtype != dtype:
        head.register_forward_pre_hook(_convert_input)
    if embedding is not None and embedding.weight.dtype != dtype:
        embedding.register_forward_hook(_ConvertOutput(dtype))


def remove_conversions(view: nn.Module) -> None:
    """Undo `convert_between_dtypes` in a view whose parameters all get one dtype."""
    for part in view.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for name, hook in list(hooks.items()):
                if hook is _convert_input or isinstance(hook, _ConvertOutput):
                    del hooks[name]


def _part(view: nn.Module, getter: str) -> nn.Linear | nn.Embedding | None:
    part = getattr(view, getter, lambda: None)()
    return part if isinstance(part, nn.Linear | nn.Embedding) else None


def _convert_input(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = head.weight
    assert isinstance(weight, Tensor)
    states, *others = args
    return states.to(weight.dtype), *others

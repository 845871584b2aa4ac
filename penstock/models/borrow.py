"""A view of somebody's live module: its own tree, config and mode over the very same parameters.

The engine switches the view to its attention and to `eval()`, and may rewrite its layers, while the owner's module
stays as it was at every moment: same state dict, same config, trainable. In-place changes of parameters show at once.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from penstock.errors import ConfigurationError


def view_of(module: nn.Module) -> nn.Module:
    """A structural copy of `module` that shares every parameter and buffer. Raises `ConfigurationError`."""
    shared = {id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
    try:
        view: nn.Module = copy.deepcopy(module, dict(shared))
    except (TypeError, RuntimeError) as error:
        raise ConfigurationError(
            f"{type(module).__name__} cannot be borrowed ({error}): save it with save_pretrained and pass the folder"
        ) from error
    return view.eval()


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the module's first floating-point parameter lives, and its dtype."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers."""
    tensors = {t.data_ptr(): t for t in itertools.chain(module.parameters(), module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())

"""Sees through what training loops put around a module: `unwrapped`, `unwrapped_name`, `refuse_scattered` and others.

Compiled modules (`torch.compile`) and data-parallel ones run the module that they contain; a sharded one has not all of
its weights. Owns nothing and changes nothing. Called by `borrow` and `loading`.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from penstock.errors import ConfigurationError

COMPILED = "_orig_mod"  # where the wrapper of `torch.compile` keeps its module
_SHARDED = ("FullyShardedDataParallel", "DTensor")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside compiled and data-parallel wrappers; `module` itself where there are none."""
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def parameters_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by the names that they have without any wrapper; tied ones under each of theirs."""
    named = unwrapped(module).named_parameters(remove_duplicate=False)
    return {name_before_compiling(name): parameter for name, parameter in named}


def name_before_compiling(name: str) -> str:
    """The name of a weight without what `torch.compile` adds to it."""
    return name.replace(f"{COMPILED}.", "")


def unwrapped_name(name: str) -> str:
    """The name of a weight without what compiled and data-parallel wrappers add to it."""
    return name_before_compiling(name).removeprefix("module.")


def refuse_scattered(module: nn.Module) -> None:
    """Raise `ConfigurationError` for a module whose weights are not all in the memory of one device."""
    names = {type(part).__name__ for part in (*module.modules(), *module.parameters())}
    if any(name in names for name in _SHARDED):
        raise ConfigurationError(
            "a module that FSDP has sharded cannot be borrowed, because no process has all of its weights: gather its "
            "full state dict into a module that is not sharded, and pass that one"
        )
    devices = sorted({str(parameter.device) for parameter in module.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ConfigurationError(
            f"a module whose parameters are on several devices or offloaded ({', '.join(devices)}) cannot be borrowed: "
            "load it without device_map, onto one device"
        )


def _inner(module: nn.Module) -> nn.Module | None:
    name = "module" if isinstance(module, DataParallel | DistributedDataParallel) else COMPILED
    return module._modules.get(name)

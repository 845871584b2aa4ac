"""A view of somebody's live module: its own tree, config and mode over the very same parameters.

The engine switches the view to its attention and to eval mode, and may rewrite its layers, while the owner's module
stays as it was at every moment: same state dict, same config, trainable. In-place changes of parameters show at once;
what else becomes of the module is noticed by `Borrowed`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError, ExecutionError, text_of
from penstock.models.watch import HOOKS, Watch, acting, functions_of, is_adapter_layer

ATTEMPTS = 5  # to copy a tree that its owner is changing

_ATOMS = (bool, int, float, str, type(None), torch.dtype, torch.device)
# They concern gradients and checkpoints, of which a view has none.
_DROPPED = frozenset(
    {
        "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip


class Borrowed:
    """A live module, and `view`, the latest view of it. `packed`: that computes with copies of weights, made once.

    Belongs to the thread that runs the model, after construction. Raises `ConfigurationError`.
    """

    def __init__(self, owner: nn.Module, *, packed: bool = False) -> None:
        self._owner = owner
        self._functions = functions_of(owner) if packed else None
        self._watch: Watch | None
        self._watch, self.view = _looked_at(owner)
        self._place = device_and_dtype(owner)
        self._is_new = False

    def changed(self, *, thorough: bool = False) -> bool:
        """Whether the module is no longer what its view was made from, as far as `Watch` compares in one call.

        A view that was just renewed is not looked at thoroughly: where the owner's own forward passes change
        attributes all the time, no step would ever run.
        """
        thorough, self._is_new = thorough and not self._is_new, False
        return self._watch is None or self._watch.changed(thorough=thorough)

    def renew(self, attach: Callable[[nn.Module], None]) -> bool:
        """Have `attach` take over a view of what the module is now; False where the last one still does.

        Raises `ExecutionError`, with the remedy, when the module cannot be served so: in every step, until it is
        changed again.
        """
        if self._functions is not None:
            self._recognize(self._functions)
            return False
        self._watch = None
        try:
            watch, view = _looked_at(self._owner)
            attach(view)
        except ConfigurationError as error:
            raise ExecutionError(
                f"the borrowed module was changed, and cannot be served as it is now: {error}"
            ) from error
        self._watch, self.view, self._is_new = watch, view, True
        return True

    def check_place(self) -> None:
        """Raise `ExecutionError` where the module was moved to another device or dtype: the cache is not."""
        place = device_and_dtype(self._owner)
        if place != self._place:
            here, there = (f"{device} in {dtype}" for device, dtype in (place, self._place))
            raise ExecutionError(
                f"the borrowed module was moved: it is on {here}, and was loaded on {there}: "
                "move it back, or make a new engine"
            )

    def _recognize(self, functions: list[tuple[Any, ...]]) -> None:
        if functions_of(self._owner) != functions:
            raise ExecutionError(
                "the borrowed module has other adapters, hooks or submodules than when it was loaded, and with "
                "compile_model=True the engine serves packed copies of what it was then: change it back, make a new "
                "engine, or leave compile_model out"
            )
        self._watch = Watch(self._owner)


def _looked_at(owner: nn.Module) -> tuple[Watch, nn.Module]:
    """A view, and a watch that is older: what changes while the tree is copied shows in the next comparison."""
    for _ in range(ATTEMPTS - 1):
        with suppress(ConfigurationError, RuntimeError):  # a dictionary may have changed while it was read
            return Watch(owner), view_of(owner)
    return Watch(owner), view_of(owner)


def view_of(module: nn.Module) -> nn.Module:
    """A structural copy of `module` in eval mode that shares every parameter and every buffer of its checkpoints.

    Forward hooks and replaced `forward` methods act in the view as they do in the module. Buffers that belong to no
    checkpoint are derived, and forward passes of their owner may rewrite them: of these the view has its own. Raises
    `ConfigurationError`.
    """
    _refuse_merged_and_disabled(module)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), _saved(module))}
    try:
        view = _copied(module, memo)
    except (TypeError, RuntimeError) as error:
        raise ConfigurationError(
            f"{type(module).__name__} cannot be borrowed ({text_of(error)}): "
            "save it with save_pretrained and pass the folder"
        ) from error
    for part in view.modules():
        part.training = False  # not by `eval()`: some adapter layers merge their weights there
    return view


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


def _refuse_merged_and_disabled(module: nn.Module) -> None:
    """In this state peft's layers unmerge the weights in their next forward pass: the owner's weights, by the view."""
    for part in module.modules():
        if is_adapter_layer(part) and part.merged_adapters and getattr(part, "disable_adapters", False):
            raise ConfigurationError(
                "its adapters are merged into the weights and disabled at the same time: call unmerge_adapter() first"
            )


def _saved(module: nn.Module) -> Iterator[Tensor]:
    """The buffers that a checkpoint holds."""
    for part in module.modules():
        derived = part._non_persistent_buffers_set
        yield from (buffer for name, buffer in part._buffers.items() if buffer is not None and name not in derived)


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As `copy.deepcopy`, ten times as fast for the modules that do not say how they are copied."""
    known: nn.Module | None = memo.get(id(module))
    if known is not None:
        return known
    kind = type(module)
    if hasattr(kind, "__deepcopy__") or kind.__setstate__ is not nn.Module.__setstate__:
        return copy.deepcopy(module, memo)
    made = kind.__new__(kind)
    memo[id(module)] = made
    vars(made).update({name: _value(name, value, memo) for name, value in list(vars(module).items())})
    return made


def _value(name: str, value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, _ATOMS):
        return value
    if name in _DROPPED or (isinstance(value, dict) and not value):
        return type(value)()
    if name == "_modules":
        return {child: part and _copied(part, memo) for child, part in list(value.items())}
    if name == "_parameters":
        return dict(value)
    if name in HOOKS:
        return type(value)((number, _hook(hook, memo)) for number, hook in acting(value).items())
    return copy.deepcopy(value, memo)


def _hook(hook: Any, memo: dict[int, Any]) -> Any:
    """The owner's own hook, so that what it is told later counts; a method of a module becomes that of its copy."""
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        return copy.deepcopy(hook, memo)
    return hook

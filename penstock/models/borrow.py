"""A view of a caller's live module: a tree, config and mode of its own over the same parameters.

The engine switches the view to its attention and to eval mode, and may rewrite its layers, while the owner's module
never changes: same state dict, same config, trainable. In-place changes of parameters show at once; `Borrowed` detects
other changes of the module.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError, ExecutionError, text_of
from penstock.models.watch import HOOKS, Hooks, Watch, computation_of, effective_hooks, is_adapter_layer

ATTEMPTS = 5  # to copy a tree that its owner is changing

H = TypeVar("H", bound=Callable[..., object])

_IMMUTABLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
# These concern gradients and checkpoints, and a view has neither.
_DROPPED = frozenset(
    {
        "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip


class Borrowed:
    """A live module (`owner`), and `view`, the latest view of it.

    With `packed`, the view computes with copies of the weights.
    After construction, used on the thread that runs the model only. Raises `ConfigurationError`.
    """

    def __init__(self, owner: nn.Module, *, packed: bool = False) -> None:
        self.owner = owner
        self._packed_computation = computation_of(owner) if packed else None
        self._watch: Watch | None
        self._watch, self.view = _watched_view(owner)
        self._placement = device_and_dtype(owner)
        self._just_renewed = False

    def changed(self, *, thorough: bool = False) -> bool:
        """Whether the module is no longer what its view was made from, as far as `Watch` compares in one call.

        A view that was just renewed is not compared thoroughly: where the owner's own forward passes keep changing
        attributes, no step would ever run.
        """
        thorough, self._just_renewed = thorough and not self._just_renewed, False
        return self._watch is None or self._watch.changed(thorough=thorough)

    def renew(self, attach: Callable[[nn.Module], None]) -> bool:
        """Call `attach` with a new view of the changed module; False where the current view is still right.

        Raises `ExecutionError` with the remedy when the changed module cannot be served: in every step, until it is
        changed again.
        """
        if self._packed_computation is not None:
            self._require_computation(self._packed_computation)
            return False
        self._watch = None
        try:
            watch, view = _watched_view(self.owner)
            attach(view)
        except ConfigurationError as error:
            raise ExecutionError(
                f"the borrowed module was changed, and cannot be served as it is now: {error}"
            ) from error
        self._watch, self.view, self._just_renewed = watch, view, True
        return True

    def check_placement(self) -> None:
        """Raise `ExecutionError` where the module was moved to another device or dtype: the cache was not."""
        placement = device_and_dtype(self.owner)
        if placement != self._placement:
            current, original = (f"{device} in {dtype}" for device, dtype in (placement, self._placement))
            raise ExecutionError(
                f"the borrowed module was moved: it is on {current}, and was loaded on {original}: "
                "move it back, or make a new engine"
            )

    def _require_computation(self, computation: list[tuple[object, ...]]) -> None:
        if computation_of(self.owner) != computation:
            raise ExecutionError(
                "the borrowed module has other adapters, hooks or submodules than when it was loaded, and with "
                "compile_model=True the engine serves packed copies of what it was then: change it back, make a new "
                "engine, or leave compile_model out"
            )
        self._watch = Watch(self.owner)


def _watched_view(owner: nn.Module) -> tuple[Watch, nn.Module]:
    """A view, and an older watch: what changes while the tree is copied shows in the next comparison."""
    for _ in range(ATTEMPTS - 1):
        with suppress(ConfigurationError, RuntimeError):  # a dictionary may change while it is read
            return Watch(owner), view_of(owner)
    return Watch(owner), view_of(owner)


def view_of(module: nn.Module) -> nn.Module:
    """A structural copy of `module` in eval mode that shares all its parameters and persistent buffers.

    Forward hooks and replaced `forward` methods act in the view as they do in the module. Buffers that are not
    persistent are derived, and forward passes of the owner may rewrite them: the view has copies of these. Raises
    `ConfigurationError`.
    """
    _refuse_merged_and_disabled(module)
    memo: dict[int, object] = {
        id(tensor): tensor for tensor in itertools.chain(module.parameters(), _persistent_buffers(module))
    }
    try:
        view = _copy_module(module, memo)
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
    """In this state a forward pass of the view would make peft's layers unmerge the weights, which are the owner's."""
    for part in module.modules():
        if is_adapter_layer(part) and part.merged_adapters and getattr(part, "disable_adapters", False):
            raise ConfigurationError(
                "its adapters are merged into the weights and disabled at the same time: call unmerge_adapter() first"
            )


def _persistent_buffers(module: nn.Module) -> Iterator[Tensor]:
    """The buffers that a checkpoint holds."""
    for part in module.modules():
        derived = part._non_persistent_buffers_set
        yield from (buffer for name, buffer in part._buffers.items() if buffer is not None and name not in derived)


def _copy_module(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    """As `copy.deepcopy`, ten times as fast for modules that do not define how they are copied."""
    earlier_copy = memo.get(id(module))
    if isinstance(earlier_copy, nn.Module):
        return earlier_copy
    kind = type(module)
    if hasattr(kind, "__deepcopy__") or kind.__setstate__ is not nn.Module.__setstate__:
        return copy.deepcopy(module, memo)
    module_copy = kind.__new__(kind)
    memo[id(module)] = module_copy
    attributes = list(vars(module).items())
    vars(module_copy).update({name: _copy_attribute(name, value, memo) for name, value in attributes})
    return module_copy


def _copy_attribute(name: str, value: Any, memo: dict[int, object]) -> object:
    """A copy for the view; `value` is any attribute of a module."""
    if isinstance(value, _IMMUTABLE):
        return value
    if name in _DROPPED or (isinstance(value, dict) and not value):
        return type(value)()
    if name == "_modules":
        return {child: part and _copy_module(part, memo) for child, part in list(value.items())}
    if name == "_parameters":
        return dict(value)
    if name in HOOKS:
        hooks: Hooks = value
        return type(hooks)((number, _copy_hook(hook, memo)) for number, hook in effective_hooks(hooks).items())
    return copy.deepcopy(value, memo)


def _copy_hook(hook: H, memo: dict[int, object]) -> H:
    """The owner's own hook, so that its later changes count; a method of a module becomes that of the module's copy."""
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        return copy.deepcopy(hook, memo)
    return hook

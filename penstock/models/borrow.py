"""A view of a caller's live module: a tree, config and mode of its own over the same parameters.

The engine switches the view to its attention and to eval mode, and may rewrite its layers, while the owner's module
never changes: same state dict, same config, trainable. A view runs the forward methods of the classes: wrappers, hooks
and forward methods of single instances belong to the owner's training. In-place changes of parameters show at once;
`Borrowed` detects other changes of the module.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError, ExecutionError, text_of
from penstock.models.building import dtype_exceptions
from penstock.models.mixed_dtypes import convert_between_dtypes, remove_conversions
from penstock.models.watch import REPLACEMENTS, Watch, computation_of, is_adapter_layer, merged_adapters_of
from penstock.models.wrappers import parameters_by_name, refuse_scattered, unwrapped

ATTEMPTS = 5  # to copy a tree that its owner is changing

_IMMUTABLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
# These concern gradients and checkpoints, and a view has neither.
_GRADIENT_HOOKS = frozenset(
    {
        "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip
_FORWARD_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks"})


class Borrowed:
    """A live module (`owner`), and `view`, the latest view of it.

    With `packed`, the view computes with copies of the weights. `dtype` copies its parameters to that dtype at once.
    Used on the thread that runs the model only, once it is made. Raises `ConfigurationError`.
    """

    def __init__(self, owner: nn.Module, *, packed: bool = False, dtype: torch.dtype | None = None) -> None:
        owner = self.owner = unwrapped(owner)
        self._packed_computation = computation_of(owner) if packed else None
        self._watch: Watch | None
        self._watch, self.view = _watched_view(owner)
        self.is_cast = dtype is not None
        if dtype is not None:
            _cast(self.view, dtype)
        self._merged_adapters = merged_adapters_of(owner)
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

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The module's parameters now, by name, for packed copies. Raises `ExecutionError` if it computes otherwise."""
        if self._packed_computation is not None:
            self._require_computation(self._packed_computation)
        if merged_adapters_of(self.owner) != self._merged_adapters:
            raise ExecutionError(
                "adapters of the borrowed module were merged or unmerged since it was loaded, so packed copies of its "
                "weights would count them twice or not at all: undo that before an update"
            )
        self.check_placement()
        return parameters_by_name(self.owner)

    def _require_computation(self, computation: list[tuple[object, ...]]) -> None:
        if computation_of(self.owner) != computation:
            raise ExecutionError(
                "the borrowed module has other adapters or submodules than when it was loaded, and with "
                "weight_mode='packed' the engine serves packed copies of what it was then: change it back, make a new "
                "engine, or set weight_mode='shared'"
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

    Wrappers, hooks and `forward` methods of instances are left out; hooks of `torch.nn.utils` stay, because they
    compute weights. Buffers that are not persistent are derived, and forward passes of the owner may rewrite them: the
    view has copies of these. Raises `ConfigurationError`.
    """
    _refuse_merged_and_disabled(module)
    refuse_scattered(module)
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
    convert_between_dtypes(view)
    return view


def _cast(view: nn.Module, dtype: torch.dtype) -> None:
    """Give the view parameters of its own in `dtype`, or in float32 where the model demands that."""
    remove_conversions(view)
    exceptions = dtype_exceptions(view, dtype)
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in list(view.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if parameter.is_floating_point():
            value = parameter.detach().to(exceptions.get(name, dtype))
            copy_once = copies.setdefault(id(parameter), nn.Parameter(value, requires_grad=False))
            view.get_submodule(path)._parameters[leaf] = copy_once


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
    wrapper, module = module, unwrapped(module)
    earlier_copy = memo.get(id(module))
    if isinstance(earlier_copy, nn.Module):
        return earlier_copy
    kind = type(module)
    if hasattr(kind, "__deepcopy__") or kind.__setstate__ is not nn.Module.__setstate__:
        return _with_own_forwards(copy.deepcopy(module, memo), set(module.modules()))
    module_copy = kind.__new__(kind)
    memo[id(module)] = memo[id(wrapper)] = module_copy
    attributes = [(name, value) for name, value in vars(module).items() if name not in REPLACEMENTS]
    vars(module_copy).update({name: _copy_attribute(name, value, memo) for name, value in attributes})
    return module_copy


def _with_own_forwards(module: nn.Module, originals: set[nn.Module]) -> nn.Module:
    """The copy of a module, without what replaced or surrounded the forward methods of its parts.

    A part whose class refuses to be copied is one of the originals, and stays as it is.
    """
    for part in set(module.modules()) - originals:
        state = vars(part)
        for name in REPLACEMENTS & state.keys():
            del state[name]
        for name in _FORWARD_HOOKS:
            state[name] = _weight_hooks(state[name])
    return module


def _copy_attribute(name: str, value: Any, memo: dict[int, object]) -> object:
    """A copy for the view; `value` is any attribute of a module."""
    if isinstance(value, _IMMUTABLE):
        return value
    if name in _GRADIENT_HOOKS or (isinstance(value, dict) and not value):
        return type(value)()
    if name == "_modules":
        return {child: None if part is None else _copy_module(part, memo) for child, part in list(value.items())}
    if name == "_parameters":
        return dict(value)
    if name in _FORWARD_HOOKS:
        return _weight_hooks(value)
    if isinstance(value, Tensor) and value.grad_fn is not None:  # left over from a forward pass
        return value.detach()
    return copy.deepcopy(value, memo)


def _weight_hooks(hooks: dict[int, Callable[..., object]]) -> dict[int, Callable[..., object]]:
    """The hooks with which `torch.nn.utils` computes a module's weight before each pass: norms, pruning."""
    of_torch = [(n, hook) for n, hook in list(hooks.items()) if type(hook).__module__.startswith("torch.nn.utils.")]
    return type(hooks)(of_torch)

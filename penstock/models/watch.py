"""Whether a live module has become another one: what decides what it computes, besides the numbers in its weights.

Owns the comparison with how the module was: adapters (peft's), hooks, submodules, parameters, attributes. Never changes
the module and never looks into a tensor. Called by `borrow` once per step, so most of it is comparisons that run in C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Attributes of a module that say nothing about what it computes in eval mode, and those that are compared otherwise.
_FREE = frozenset(
    {
        *HOOKS, "training", "generation_config", "gradient_checkpointing", "_gradient_checkpointing_func",
        "_require_grads_hook",
        "_require_grads_hooks", "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set",
        "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
        "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip
# Forward hooks of transformers and peft that concern gradients alone.
_GRADIENT_HOOKS = frozenset({"make_inputs_require_grads", "make_inputs_require_grad"})
# What peft's adapter layers change when adapters are enabled, chosen, merged, scaled, added or deleted.
_SWITCHES = itemgetter("_disable_adapters", "_active_adapter")
_CONTENTS = ("merged_adapters", "scaling")
# How many modules are compared attribute by attribute in one call, and how many adapter layers' switches.
PORTION = 8
SWITCH_PORTION = 64

State = Mapping[str, Any]


class Watch:
    """How `module` is now. `changed` says whether it is still so.

    Every call compares hooks and what all adapter layers have merged, and by turns a portion of everything else; a
    method of peft's model switches all layers, which shows in any portion. `thorough` compares everything.
    """

    def __init__(self, module: nn.Module) -> None:
        self._num_handles = RemovableHandle.next_id  # before anything is read
        self._modules = list(module.modules())
        states = [vars(part) for part in self._modules]
        self._hooks: list[dict[int, Any]] = [state[name] for state in states for name in HOOKS]
        self._hooks_before = [acting(hooks) for hooks in self._hooks]
        self._hooked = [(hooks, dict(hooks)) for hooks in self._hooks if hooks]
        self._adapters = [state for state in states if _has_switches(state)]
        self._switches_before = list(map(_SWITCHES, self._adapters))
        self._contents = [state[name] for state in self._adapters for name in _CONTENTS if name in state]
        self._contents_before = [value.copy() for value in self._contents]
        self._names = [_names(state) for state in states]
        self._looks = [itemgetter(*names, "_modules") for names in self._names]
        pairs = zip(self._modules, self._looks, strict=True)
        self._parts_before = [_part(part, look, copied=True) for part, look in pairs]
        self._next_switches = self._next_parts = 0

    def changed(self, *, thorough: bool = False) -> bool:
        """Whether anything differs that was compared."""
        try:
            quick = self._contents != self._contents_before or self._hooks_changed()
            return quick or self._switches_changed(thorough) or self._parts_changed(thorough)
        except Exception:  # an attribute that is gone, or that became something that cannot be compared
            return True

    def _switches_changed(self, thorough: bool) -> bool:
        turn, self._next_switches = _turn(self._next_switches, SWITCH_PORTION, len(self._adapters), thorough)
        return list(map(_SWITCHES, self._adapters[turn])) != self._switches_before[turn]

    def _hooks_changed(self) -> bool:
        """PyTorch numbers the hooks of a process, so only a new number is worth a look at modules without hooks."""
        latest = RemovableHandle.next_id
        if latest == self._num_handles and all(hooks == before for hooks, before in self._hooked):
            return False
        self._num_handles = latest
        self._hooked = [(hooks, dict(hooks)) for hooks in self._hooks if hooks]
        return list(map(acting, self._hooks)) != self._hooks_before

    def _parts_changed(self, thorough: bool) -> bool:
        turn, self._next_parts = _turn(self._next_parts, PORTION, len(self._modules), thorough)
        pairs = zip(self._modules[turn], self._looks[turn], strict=True)
        if [_part(module, look) for module, look in pairs] == self._parts_before[turn]:
            return False
        return any(self._part_changed(index) for index in range(*turn.indices(len(self._modules))))

    def _part_changed(self, index: int) -> bool:
        """Whether there is more to a difference than attributes that do not count."""
        module, before = self._modules[index], self._parts_before[index]
        size, *values = _part(module, self._looks[index])
        if values != list(before[1:]) or _names(vars(module)) != self._names[index]:
            return True
        self._parts_before[index] = (size, *before[1:])
        return False


def acting(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """The hooks that may change what a module computes."""
    return {number: hook for number, hook in hooks.items() if getattr(hook, "__name__", "") not in _GRADIENT_HOOKS}


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether this is a layer of peft's that holds adapters around a layer of the model."""
    return _has_switches(vars(module))


def functions_of(module: nn.Module) -> list[tuple[Any, ...]]:
    """What `module` computes with its weights as they are: equal lists, equal functions.

    Merging an adapter, and adding one that is not active, leave it as it was.
    """
    parts: list[tuple[Any, ...]] = []
    inside: set[nn.Module] = set()
    for part in module.modules():
        state = vars(part)
        hooks = [acting(state[name]) for name in HOOKS]
        if is_adapter_layer(part):
            inside.update(part.modules())
            parts.append((type(part), hooks, *_adapters_of(state)))
        elif part not in inside:
            parts.append((type(part), hooks, list(state["_modules"].values()), state.get("forward")))
    return parts


def _adapters_of(state: State) -> tuple[bool, list[str], list[Any]]:
    active = state["_active_adapter"]
    names = [active] if isinstance(active, str) else list(active)
    return state["_disable_adapters"], names, [state.get("scaling", {}).get(name) for name in names]


def _has_switches(state: State) -> bool:
    return "merged_adapters" in state and "_disable_adapters" in state and "_active_adapter" in state


def _names(state: State) -> tuple[str, ...]:
    """The attributes that are compared one by one. Tensors among them are what a forward pass left behind."""
    return (*(name for name, value in state.items() if name not in _FREE and not isinstance(value, Tensor)), "_modules")


def _part(module: nn.Module, look: Callable[[State], Any], *, copied: bool = False) -> tuple[Any, ...]:
    state = vars(module)
    values = look(state)
    if copied:
        values = tuple(value.copy() if type(value) in (dict, list, set) else value for value in values)
    return len(state), type(module), list(map(id, state["_parameters"].values())), values


def _turn(begin: int, count: int, total: int, thorough: bool) -> tuple[slice, int]:
    """Whose turn it is of `total`, and where the next one begins."""
    end = total if thorough else min(begin + count, total)
    return slice(0 if thorough else begin, end), end % max(total, 1)

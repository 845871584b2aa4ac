"""`Watch` detects changes of a live module in anything that decides what it computes, except the values of tensors.

Compares adapters (peft's), submodules, parameters and attributes with an earlier state. Never changes the module and
never reads a tensor. Called by `borrow` once per step, so most of it is comparisons that run in C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from penstock.models.wrappers import unwrapped

# What training loops and compilers put over or around the forward method of one instance: views do without.
REPLACEMENTS = frozenset({"forward", "_original_forward", "_old_forward", "_hf_hook", "_compiled_call_impl"})
# Attributes that do not affect what a view computes, and those that are compared in another way.
_NOT_COMPARED = REPLACEMENTS | {
    "training", "generation_config", "gradient_checkpointing", "_gradient_checkpointing_func",
    "_require_grads_hook", "_require_grads_hooks", "model_tags", "warnings_issued",
    "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_forward_hooks", "_forward_pre_hooks",
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
}  # fmt: skip
# What changes in peft's adapter layers when adapters are enabled, selected, merged, scaled, added or deleted.
_SWITCHES = itemgetter("_disable_adapters", "_active_adapter")
_CONTENTS = ("merged_adapters", "scaling")
# How many modules are compared attribute by attribute in one call, and how many adapter layers' switches.
PORTION = 8
SWITCH_PORTION = 64

State = Mapping[str, Any]  # the attributes of a module, by name


class Watch:
    """The state of `module` at construction; `changed` compares it with the current one.

    Every call compares what all adapter layers have merged, and in turn a portion of everything else; a method of
    peft's model switches all layers, which shows in any portion. `thorough` compares everything.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        states = [vars(part) for part in self._modules]
        self._adapters = [state for state in states if _has_switches(state)]
        self._initial_switches = list(map(_SWITCHES, self._adapters))
        self._contents = [state[name] for state in self._adapters for name in _CONTENTS if name in state]
        self._initial_contents = [value.copy() for value in self._contents]
        self._names = [_compared_names(state) for state in states]
        self._getters = [itemgetter(*names, "_modules") for names in self._names]
        pairs = zip(self._modules, self._getters, strict=True)
        self._initial_parts = [_part_state(part, getter, copied=True) for part, getter in pairs]
        self._next_switches = self._next_parts = 0

    def changed(self, *, thorough: bool = False) -> bool:
        """Whether anything differs in what this call compares."""
        try:
            if self._contents != self._initial_contents:
                return True
            return self._switches_changed(thorough) or self._parts_changed(thorough)
        except Exception:  # an attribute was removed, or now has a value that cannot be compared
            return True

    def _switches_changed(self, thorough: bool) -> bool:
        turn, self._next_switches = _next_turn(self._next_switches, SWITCH_PORTION, len(self._adapters), thorough)
        return list(map(_SWITCHES, self._adapters[turn])) != self._initial_switches[turn]

    def _parts_changed(self, thorough: bool) -> bool:
        turn, self._next_parts = _next_turn(self._next_parts, PORTION, len(self._modules), thorough)
        pairs = zip(self._modules[turn], self._getters[turn], strict=True)
        if [_part_state(module, getter) for module, getter in pairs] == self._initial_parts[turn]:
            return False
        return any(self._part_changed(index) for index in range(*turn.indices(len(self._modules))))

    def _part_changed(self, index: int) -> bool:
        """Whether a difference goes beyond attributes that are not compared."""
        module, initial = self._modules[index], self._initial_parts[index]
        size, *values = _part_state(module, self._getters[index])
        if values != list(initial[1:]) or _compared_names(vars(module)) != self._names[index]:
            return True
        self._initial_parts[index] = (size, *initial[1:])
        return False


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether this is a layer of peft that wraps a layer of the model in adapters."""
    return _has_switches(vars(module))


def computation_of(module: nn.Module) -> list[tuple[object, ...]]:
    """What `module` computes with its weights as they are: equal lists mean equal functions.

    Wrappers, merging an adapter, and adding one that is not active leave it as it was.
    """
    parts: list[tuple[object, ...]] = []
    adapter_parts: set[nn.Module] = set()
    for part in module.modules():
        state = vars(part)
        if unwrapped(part) is not part:
            continue
        if is_adapter_layer(part):
            adapter_parts.update(part.modules())
            parts.append((type(part), *_active_adapters(state)))
        elif part not in adapter_parts:
            children = list(state["_modules"].values())
            parts.append((type(part), [None if child is None else unwrapped(child) for child in children]))
    return parts


def merged_adapters_of(module: nn.Module) -> list[list[str]]:
    """The names of the adapters that each adapter layer has merged into its weight."""
    return [list(vars(part)["merged_adapters"]) for part in module.modules() if is_adapter_layer(part)]


def _active_adapters(state: State) -> tuple[bool, list[str], list[object]]:
    active = state["_active_adapter"]
    names = [active] if isinstance(active, str) else list(active)
    return state["_disable_adapters"], names, [state.get("scaling", {}).get(name) for name in names]


def _has_switches(state: State) -> bool:
    return "merged_adapters" in state and "_disable_adapters" in state and "_active_adapter" in state


def _compared_names(state: State) -> tuple[str, ...]:
    """The attributes that are compared one by one. Tensors among them are left over from a forward pass."""
    names = (name for name, value in state.items() if name not in _NOT_COMPARED and not isinstance(value, Tensor))
    return (*names, "_modules")


def _part_state(module: nn.Module, getter: Callable[[State], Any], *, copied: bool = False) -> tuple[object, ...]:
    """What is compared of one module: number of attributes, class, identities of its parameters, attributes."""
    state = vars(module)
    values = getter(state)
    if copied:
        values = tuple(value.copy() if type(value) in (dict, list, set) else value for value in values)
    return len(state), type(module), list(map(id, state["_parameters"].values())), values


def _next_turn(begin: int, count: int, total: int, thorough: bool) -> tuple[slice, int]:
    """The portion of `total` to compare now, and where the next one begins."""
    end = total if thorough else min(begin + count, total)
    return slice(0 if thorough else begin, end), end % max(total, 1)

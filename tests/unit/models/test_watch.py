"""What counts as a change of a live module, and the cost of the comparison."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from penstock.models.watch import PORTION, SWITCH_PORTION, Watch, computation_of
from tests.tiny_models import build

QUICK_S = 50e-6  # it takes 15 microseconds on the machine where this was written
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(num_layers: int = 2) -> Any:
    return get_peft_model(build("llama", num_hidden_layers=num_layers), LoraConfig(r=2, target_modules=TARGETS))


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def test_comparing_a_model_with_two_hundred_adapter_layers_takes_microseconds() -> None:
    watch = Watch(adapted(30))
    best = 1.0
    for _ in range(500):
        begin = time.perf_counter()
        changed = watch.changed()
        best = min(best, time.perf_counter() - begin)
        assert not changed
    assert best < QUICK_S


CHANGES: dict[str, Callable[[Any], object]] = {
    "merged": lambda model: model.merge_adapter(),
    "one layer merged": lambda model: layers_of(model)[-1].merge(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "scaled": lambda model: layers_of(model)[-1].scale_layer(2.0),
    "added": lambda model: model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS)),
    "deleted": lambda model: model.delete_adapter("default"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_adapters_show_in_every_call(what: str) -> None:
    model = adapted()
    watch = Watch(model)
    assert not watch.changed(thorough=True)
    CHANGES[what](model)
    assert watch.changed()


def replace_parameter(model: Any) -> None:
    base = layers_of(model)[-1].base_layer
    base.weight = nn.Parameter(base.weight.clone())


def replace_module(model: Any) -> None:
    layers_of(model)[-1].base_layer = nn.Identity()


def set_attribute(model: Any) -> None:
    layers_of(model)[-1].fan_in_fan_out = True


@pytest.mark.parametrize("change", [replace_parameter, replace_module, set_attribute])
def test_other_changes_show_in_a_thorough_call_and_in_turn(change: Callable[[Any], None]) -> None:
    model = adapted()
    thorough, by_turns = Watch(model), Watch(model)
    change(model)
    assert thorough.changed(thorough=True)
    assert any(by_turns.changed() for _ in range(-(-len(list(model.modules())) // PORTION)))


def test_one_switched_layer_of_many_shows_in_turn() -> None:
    model = adapted(12)
    watch = Watch(model)
    layers = layers_of(model)
    layers[-1].enable_adapters(False)
    assert any(watch.changed() for _ in range(-(-len(layers) // SWITCH_PORTION)))


def test_hooks_forwards_of_instances_and_compilers_are_no_change() -> None:
    """Views do without them."""
    model: Any = adapted()
    watch, computation = Watch(model), computation_of(model)
    layers_of(model)[-1].base_layer.register_forward_hook(lambda *args: None)
    model._original_forward, model.forward = model.forward, torch.relu
    model.base_model.model.compile()
    assert not watch.changed(thorough=True)
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0])
    assert computation_of(model) == computation


def test_attributes_left_by_a_forward_pass_are_no_change() -> None:
    model: Any = adapted()
    watch = Watch(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.base_model.model.last_output = torch.zeros(3)
    assert not watch.changed(thorough=True)
    assert not watch.changed()


def test_functions_are_equal_where_adapters_are_merged_or_idle() -> None:
    model = adapted()
    before = computation_of(model)
    model.merge_adapter()
    assert computation_of(model) == before
    model.unmerge_adapter()
    CHANGES["added"](model)
    assert computation_of(model) == before
    model.set_adapter("other")
    assert computation_of(model) != before

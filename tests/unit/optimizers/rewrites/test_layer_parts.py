"""Recipes find the parts of decoder layers by structure, and leave alone what they do not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from penstock.optimizers.rewrites.layer_parts import LayerParts, layer_parts_of, linear_weights_of
from tests.tiny_models import ARCHITECTURES, build

# Per architecture: matrices of the projection, matrices into the MLP (0: the layer's own MLP runs), activation, and
# which norms there are: before and after attention, before and after the MLP, of queries and keys.
PARTS: dict[str, tuple[int, int, str, str]] = {
    "llama": (3, 2, "silu", "x-x- -"),
    "qwen2": (3, 2, "silu", "x-x- -"),
    "qwen3": (3, 2, "silu", "x-x- x"),
    "mistral": (3, 2, "silu", "x-x- -"),
    "gemma2": (3, 2, "gelu_tanh", "xxxx -"),
    "gemma3_text": (3, 2, "gelu_tanh", "xxxx x"),
    "gpt2": (1, 1, "gelu_tanh", "x-x- -"),
    "opt": (3, 1, "relu", "x-x- -"),
    "phi3": (1, 2, "silu", "x-x- -"),
    "granite": (3, 2, "silu", "x-x- -"),
    "smollm3": (3, 2, "silu", "x-x- -"),
    "olmo2": (3, 2, "silu", "-x-x x"),
    "mixtral": (3, 0, "identity", "x-x- -"),
}


def first_layer(name: str, **changes: Any) -> nn.Module:
    model: Any = build(name, **changes)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 2]
    return lists[0][0]


def norms_of(parts: LayerParts) -> str:
    marks = ["-" if norm is None else "x" for norm in parts.norms]
    return "".join(marks) + " " + ("-" if parts.query_norm is None or parts.key_norm is None else "x")


@pytest.mark.parametrize("name", PARTS)
def test_recipes_find_the_parts_of_known_layers(name: str) -> None:
    parts = layer_parts_of(first_layer(name))
    assert parts is not None
    assert (len(parts.qkv), len(parts.mlp), parts.act, norms_of(parts)) == PARTS[name]
    assert (parts.unfused_mlp is None) == bool(parts.mlp) == (parts.down is not None)


@pytest.mark.parametrize("name", ARCHITECTURES.keys() - PARTS.keys() - {"gpt_oss"})
def test_layers_of_other_shapes_are_left_alone(name: str) -> None:
    assert layer_parts_of(first_layer(name)) is None


def test_things_that_are_no_layers_are_left_alone() -> None:
    assert layer_parts_of(nn.Linear(4, 4)) is None
    assert layer_parts_of(nn.Module()) is None


def test_granites_residual_multiplier_is_the_scale() -> None:
    parts = layer_parts_of(first_layer("granite"))
    assert parts is not None
    assert parts.scale == 0.5


def test_fused_gates_are_the_first_half_and_ups_the_second() -> None:
    layer: Any = first_layer("phi3")
    parts = layer_parts_of(layer)
    assert parts is not None
    assert torch.equal(torch.cat([weights.weight for weights in parts.mlp]), layer.mlp.gate_up_proj.weight)
    assert [weights.weight.shape for weights in parts.mlp] == [(64, 32), (64, 32)]


def test_a_layer_with_another_activation_runs_its_own_mlp() -> None:
    parts = layer_parts_of(first_layer("llama", hidden_act="quick_gelu"))
    assert parts is not None
    assert parts.unfused_mlp is not None
    assert not parts.mlp


def test_a_layer_that_clips_its_projections_is_left_alone() -> None:
    """The numbers of a trial are too small to be clipped, so no comparison would show the difference."""
    layer: Any = first_layer("llama")
    layer.self_attn.config.clip_qkv = 8.0
    assert layer_parts_of(layer) is None


def test_matrices_of_linear_modules_are_outputs_by_inputs() -> None:
    linear, transposed = nn.Linear(3, 5), Conv1D(5, 3)
    for module, weight in ((linear, linear.weight), (transposed, transposed.weight.T)):
        weights = linear_weights_of(module)
        assert weights is not None
        assert torch.equal(weights.weight, weight)
        assert weights.bias is not None
    assert linear_weights_of(nn.Linear(3, 5, bias=False)).bias is None  # type: ignore[union-attr]


class Adapted(nn.Linear):
    """Somebody's linear module, which may compute more than the product."""


def test_a_subclass_of_linear_is_no_plain_matrix() -> None:
    assert linear_weights_of(Adapted(3, 5)) is None
    assert linear_weights_of(nn.Embedding(3, 5)) is None

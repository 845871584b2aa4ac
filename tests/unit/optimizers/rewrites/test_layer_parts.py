"""Recipes find the parts of decoder layers by structure, and leave alone what they do not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from penstock.optimizers.rewrites.layer_parts import Block, block_of, matrix_of
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


def norms_of(block: Block) -> str:
    there = ["-" if norm is None else "x" for norm in block.norms]
    return "".join(there) + " " + ("-" if block.query_norm is None or block.key_norm is None else "x")


@pytest.mark.parametrize("name", PARTS)
def test_recipes_find_the_parts_of_known_layers(name: str) -> None:
    block = block_of(first_layer(name))
    assert block is not None
    assert (len(block.qkv), len(block.mlp), block.act, norms_of(block)) == PARTS[name]
    assert (block.own_mlp is None) == bool(block.mlp) == (block.down is not None)


@pytest.mark.parametrize("name", ARCHITECTURES.keys() - PARTS.keys() - {"gpt_oss"})
def test_layers_of_other_shapes_are_left_alone(name: str) -> None:
    assert block_of(first_layer(name)) is None


def test_things_that_are_no_layers_are_left_alone() -> None:
    assert block_of(nn.Linear(4, 4)) is None
    assert block_of(nn.Module()) is None


def test_granites_residual_multiplier_is_the_scale() -> None:
    block = block_of(first_layer("granite"))
    assert block is not None
    assert block.scale == 0.5


def test_fused_gates_are_the_first_half_and_ups_the_second() -> None:
    layer: Any = first_layer("phi3")
    block = block_of(layer)
    assert block is not None
    assert torch.equal(torch.cat([matrix.weight for matrix in block.mlp]), layer.mlp.gate_up_proj.weight)
    assert [matrix.weight.shape for matrix in block.mlp] == [(64, 32), (64, 32)]


def test_a_layer_with_another_activation_runs_its_own_mlp() -> None:
    block = block_of(first_layer("llama", hidden_act="quick_gelu"))
    assert block is not None
    assert block.own_mlp is not None
    assert not block.mlp


def test_a_layer_that_clips_its_projections_is_left_alone() -> None:
    """The numbers of a trial are too small to be clipped, so no comparison would show the difference."""
    layer: Any = first_layer("llama")
    layer.self_attn.config.clip_qkv = 8.0
    assert block_of(layer) is None


def test_matrices_of_linear_modules_are_outputs_by_inputs() -> None:
    linear, transposed = nn.Linear(3, 5), Conv1D(5, 3)
    for module, weight in ((linear, linear.weight), (transposed, transposed.weight.T)):
        matrix = matrix_of(module)
        assert matrix is not None
        assert torch.equal(matrix.weight, weight)
        assert matrix.bias is not None
    assert matrix_of(nn.Linear(3, 5, bias=False)).bias is None  # type: ignore[union-attr]


class Adapted(nn.Linear):
    """Somebody's linear module, which may compute more than the product."""


def test_a_subclass_of_linear_is_no_plain_matrix() -> None:
    assert matrix_of(Adapted(3, 5)) is None
    assert matrix_of(nn.Embedding(3, 5)) is None

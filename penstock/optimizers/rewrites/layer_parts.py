"""`layer_parts_of`: the parts of a decoder layer, identified by its structure.

A recipe looks for the submodules of one structure (Llama's, Gemma 2's, OLMo 2's, GPT-2's, OPT's) under the names that
such families share; it reads no class name. Recipes may be wrong: the fused layer is compared with the original before
it is used. Pure; called by `fusion`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from penstock.kernels.products import Calibration
from penstock.optimizers.rewrites.recipes import Recipe, unchanged
from penstock.optimizers.rewrites.recognition import NormFacts, activation_of, norm_of


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """Weight [N, K] and bias [N] of one projection, their recipes, and a calibration with its inputs if there was one.

    The rows of the weight may not be contiguous.
    """

    weight: Tensor
    bias: Tensor | None
    recipes: tuple[Recipe, Recipe | None]
    calibration: Calibration | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """x += scale * post1(o(attention(qkv(pre1(x))))); x += scale * post2(down(mlp(pre2(x)))).

    `mlp` is [gate, up] or [up]; empty if the module `unfused_mlp` runs instead (mixtures of experts). `norms` are pre1,
    post1, pre2 and post2; None where the layer has no such norm.
    """

    attention: nn.Module
    qkv: Sequence[LinearWeights]
    o: LinearWeights
    mlp: Sequence[LinearWeights] = ()
    down: LinearWeights | None = None
    act: str = "identity"
    unfused_mlp: nn.Module | None = None
    norms: tuple[NormFacts | None, NormFacts | None, NormFacts | None, NormFacts | None] = field(
        default=(None, None, None, None)
    )
    query_norm: NormFacts | None = None
    key_norm: NormFacts | None = None
    scale: float = 1.0


def layer_parts_of(layer: nn.Module) -> LayerParts | None:
    """The parts of `layer`, or None when no recipe fits."""
    for recipe in (_llama, _gpt2, _opt):
        try:
            return recipe(layer)
        except _RecipeMismatch:
            continue
    return None


class _RecipeMismatch(Exception):
    """A recipe does not fit."""


def _llama(layer: nn.Module) -> LayerParts:
    attention = _child(layer, "self_attn")
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is not None:
        raise _RecipeMismatch  # only large numbers are clipped: no trial would show it
    input_norm, post_attention = "input_layernorm", "post_attention_layernorm"
    names: tuple[str | None, ...]
    if hasattr(layer, "pre_feedforward_layernorm"):
        names = (input_norm, post_attention, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    elif hasattr(layer, input_norm):
        names = (input_norm, None, post_attention, None)
    else:
        names = (None, post_attention, None, "post_feedforward_layernorm")
    gates, down, act = _gated(getattr(layer, "mlp", None))
    return LayerParts(
        attention=attention,
        qkv=_projections(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
        o=_weights(_child(attention, "o_proj", "dense", "out_proj")),
        mlp=gates,
        down=down,
        act=act,
        unfused_mlp=None if gates else _child(layer, "mlp", "block_sparse_moe", "feed_forward"),
        norms=_norms(layer, names),
        query_norm=_optional_norm(attention, "q_norm", "q_layernorm"),
        key_norm=_optional_norm(attention, "k_norm", "k_layernorm"),
        scale=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _gated(mlp: nn.Module | None) -> tuple[Sequence[LinearWeights], LinearWeights | None, str]:
    """Gate and up, down, activation of an MLP; empty if it has another structure."""
    try:
        gate = _weights(_child(mlp, "gate_proj", "gate_up_proj"))
        down = _weights(_child(mlp, "down_proj"))
    except _RecipeMismatch:
        return (), None, "identity"
    act = activation_of(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None))
    if act is None:
        return (), None, "identity"
    if hasattr(mlp, "gate_proj"):
        return (gate, _weights(_child(mlp, "up_proj"))), down, act
    return [_rows(gate, half) for half in (_first_half, _second_half)], down, act


def _rows(weights: LinearWeights, select: Callable[[Tensor], Tensor]) -> LinearWeights:
    """Some of the outputs of a projection."""
    of_weight, of_bias = weights.recipes
    recipes = of_weight.then(select), of_bias and of_bias.then(select)
    bias = None if weights.bias is None else select(weights.bias)
    return LinearWeights(select(weights.weight), bias, recipes, weights.calibration)


def _first_half(x: Tensor) -> Tensor:
    return x[: len(x) // 2]


def _second_half(x: Tensor) -> Tensor:
    return x[len(x) // 2 :]


def _gpt2(layer: nn.Module) -> LayerParts:
    attention, mlp = _child(layer, "attn"), _child(layer, "mlp")
    return LayerParts(
        attention=attention,
        qkv=(_weights(_child(attention, "c_attn")),),
        o=_weights(_child(attention, "c_proj")),
        mlp=(_weights(_child(mlp, "c_fc")),),
        down=_weights(_child(mlp, "c_proj")),
        act=_activation(getattr(mlp, "act", None)),
        norms=_norms(layer, ("ln_1", None, "ln_2", None)),
    )


def _opt(layer: nn.Module) -> LayerParts:
    attention = _child(layer, "self_attn")
    if not getattr(layer, "do_layer_norm_before", True):
        raise _RecipeMismatch
    return LayerParts(
        attention=attention,
        qkv=_projections(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
        o=_weights(_child(attention, "out_proj")),
        mlp=(_weights(_child(layer, "fc1")),),
        down=_weights(_child(layer, "fc2")),
        act=_activation(getattr(layer, "activation_fn", None)),
        norms=_norms(layer, ("self_attn_layer_norm", None, "final_layer_norm", None)),
    )


def _child(module: nn.Module | None, *names: str) -> nn.Module:
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
    raise _RecipeMismatch


def _projections(module: nn.Module, separate: Sequence[str], fused: Sequence[str]) -> Sequence[LinearWeights]:
    names = separate if hasattr(module, separate[0]) else fused
    return tuple(_weights(_child(module, name)) for name in names)


def _weights(module: nn.Module) -> LinearWeights:
    weights = linear_weights_of(module)
    if weights is None:
        raise _RecipeMismatch
    return weights


def linear_weights_of(module: nn.Module) -> LinearWeights | None:
    """Weight and bias of a plain linear module: `nn.Linear`, or GPT-2's transposed `Conv1D`; else None.

    None, too, where these are computed instead of being parameters.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if not is_linear(module) or weight is None or (bias is None and getattr(module, "bias", None) is not None):
        return None
    recipe = Recipe.of(weight, unchanged if type(module) is nn.Linear else torch.t)
    recipes = recipe, None if bias is None else Recipe.of(bias)
    rows = recipe.transform(weight.detach())
    return LinearWeights(rows, None if bias is None else bias.detach(), recipes, getattr(module, "calibration", None))


def is_linear(module: nn.Module) -> bool:
    """Whether this is an `nn.Linear` or GPT-2's `Conv1D`, and no subclass, which may do more."""
    if type(module) is nn.Linear:
        return True
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def _activation(function: Callable[[Tensor], Tensor] | None) -> str:
    name = activation_of(function)
    if name is None:
        raise _RecipeMismatch
    return name


def _norms(
    layer: nn.Module, names: tuple[str | None, ...]
) -> tuple[NormFacts | None, NormFacts | None, NormFacts | None, NormFacts | None]:
    pre1, post1, pre2, post2 = (None if name is None else _norm(_child(layer, name)) for name in names)
    return pre1, post1, pre2, post2


def _norm(module: nn.Module) -> NormFacts:
    facts = norm_of(module)
    if facts is None:
        raise _RecipeMismatch
    return facts


def _optional_norm(module: nn.Module, *names: str) -> NormFacts | None:
    present = [name for name in names if getattr(module, name, None) is not None]
    return _norm(_child(module, present[0])) if present else None

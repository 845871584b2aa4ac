"""The parts of a decoder layer, found by its structure: `block_of`.

A recipe looks for the submodules of one shape (Llama's, Gemma 2's, OLMo 2's, GPT-2's, OPT's) under the names that
the families share; it reads no class name. What a recipe gets wrong shows when the fused layer is compared with the
original, so recipes may guess. Pure; called by `fusion`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from penstock.optimizers.rewrites.recognition import NormFacts, activation_of, norm_of


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weight [N, K] and bias [N] of one projection."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """x += scale * post1(o(attention(qkv(pre1(x))))); x += scale * post2(down(mlp(pre2(x)))).

    `mlp` is [gate, up] or [up]; empty when the layer's own `own_mlp` runs instead (mixtures of experts).
    Norms that the layer lacks are None.
    """

    attention: nn.Module
    qkv: Sequence[Matrix]
    o: Matrix
    mlp: Sequence[Matrix] = ()
    down: Matrix | None = None
    act: str = "identity"
    own_mlp: nn.Module | None = None
    norms: tuple[NormFacts | None, NormFacts | None, NormFacts | None, NormFacts | None] = field(
        default=(None, None, None, None)
    )
    query_norm: NormFacts | None = None
    key_norm: NormFacts | None = None
    scale: float = 1.0


def block_of(layer: nn.Module) -> Block | None:
    """The parts of `layer`, or None when no recipe fits."""
    for recipe in (_llama, _gpt2, _opt):
        try:
            return recipe(layer)
        except _Unfit:
            continue
    return None


class _Unfit(Exception):
    """A recipe does not fit."""


def _llama(layer: nn.Module) -> Block:
    attention = _child(layer, "self_attn")
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is not None:
        raise _Unfit  # clipped only where numbers are large: no trial would show it
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    first, second = "input_layernorm", "post_attention_layernorm"
    names: tuple[str | None, ...]
    if sandwich:
        names = (first, second, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    elif hasattr(layer, first):
        names = (first, None, second, None)
    else:
        names = (None, second, None, "post_feedforward_layernorm")
    gates, down, act = _gated(getattr(layer, "mlp", None))
    return Block(
        attention=attention,
        qkv=_projections(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
        o=_matrix(_child(attention, "o_proj", "dense", "out_proj")),
        mlp=gates,
        down=down,
        act=act,
        own_mlp=None if gates else _child(layer, "mlp", "block_sparse_moe", "feed_forward"),
        norms=_norms(layer, names),
        query_norm=_optional_norm(attention, "q_norm", "q_layernorm"),
        key_norm=_optional_norm(attention, "k_norm", "k_layernorm"),
        scale=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _gated(mlp: nn.Module | None) -> tuple[Sequence[Matrix], Matrix | None, str]:
    """Gate and up, down, activation of an MLP; nothing when it is of another shape."""
    try:
        both = _matrix(_child(mlp, "gate_proj", "gate_up_proj"))
        down = _matrix(_child(mlp, "down_proj"))
    except _Unfit:
        return (), None, "identity"
    act = activation_of(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None))
    if act is None:
        return (), None, "identity"
    if hasattr(mlp, "gate_proj"):
        return (both, _matrix(_child(mlp, "up_proj"))), down, act
    half = len(both.weight) // 2
    biases = (None, None) if both.bias is None else (both.bias[:half], both.bias[half:])
    return (Matrix(both.weight[:half], biases[0]), Matrix(both.weight[half:], biases[1])), down, act


def _gpt2(layer: nn.Module) -> Block:
    attention, mlp = _child(layer, "attn"), _child(layer, "mlp")
    return Block(
        attention=attention,
        qkv=(_matrix(_child(attention, "c_attn")),),
        o=_matrix(_child(attention, "c_proj")),
        mlp=(_matrix(_child(mlp, "c_fc")),),
        down=_matrix(_child(mlp, "c_proj")),
        act=_activation(getattr(mlp, "act", None)),
        norms=_norms(layer, ("ln_1", None, "ln_2", None)),
    )


def _opt(layer: nn.Module) -> Block:
    attention = _child(layer, "self_attn")
    if not getattr(layer, "do_layer_norm_before", True):
        raise _Unfit
    return Block(
        attention=attention,
        qkv=_projections(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
        o=_matrix(_child(attention, "out_proj")),
        mlp=(_matrix(_child(layer, "fc1")),),
        down=_matrix(_child(layer, "fc2")),
        act=_activation(getattr(layer, "activation_fn", None)),
        norms=_norms(layer, ("self_attn_layer_norm", None, "final_layer_norm", None)),
    )


def _child(module: nn.Module | None, *names: str) -> nn.Module:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    raise _Unfit


def _projections(module: nn.Module, apart: Sequence[str], together: Sequence[str]) -> Sequence[Matrix]:
    names = apart if hasattr(module, apart[0]) else together
    return tuple(_matrix(_child(module, name)) for name in names)


def _matrix(module: nn.Module) -> Matrix:
    found = matrix_of(module)
    if found is None:
        raise _Unfit
    return found


def matrix_of(module: nn.Module) -> Matrix | None:
    """Weight and bias of a plain linear module: `nn.Linear`, or GPT-2's transposed `Conv1D`; else None."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(module) is nn.Linear:
        return Matrix(module.weight.detach(), None if bias is None else bias.detach())
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return Matrix(weight.detach().t().contiguous(), None if bias is None else bias.detach())
    return None


def _activation(function: Callable[[Tensor], Tensor] | None) -> str:
    found = activation_of(function)
    if found is None:
        raise _Unfit
    return found


def _norms(
    layer: nn.Module, names: tuple[str | None, ...]
) -> tuple[NormFacts | None, NormFacts | None, NormFacts | None, NormFacts | None]:
    first, second, third, fourth = (None if name is None else _norm(_child(layer, name)) for name in names)
    return first, second, third, fourth


def _norm(module: nn.Module) -> NormFacts:
    found = norm_of(module)
    if found is None:
        raise _Unfit
    return found


def _optional_norm(module: nn.Module, *names: str) -> NormFacts | None:
    present = [name for name in names if getattr(module, name, None) is not None]
    return _norm(_child(module, present[0])) if present else None

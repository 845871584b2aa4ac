"""Recognises norms and activations by what they compute.

Class names are unreliable (`LayerNorm` in one model is RMSNorm in another, Gemma's weight is one less than the factor
it applies), so a candidate is accepted if it reproduces the module's output. Pure; called while a model is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.kernels.products import LAYER, RMS
from penstock.optimizers.rewrites.recipes import Recipe

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "identity": lambda x: x,
}


@dataclass(frozen=True, slots=True)
class NormFacts:
    """A norm over the last dimension: kind (`RMS` or `LAYER`), weight [N] and bias [N] in float32, eps, recipes."""

    kind: int
    weight: Tensor
    bias: Tensor | None
    eps: float
    recipes: tuple[Recipe, Recipe | None]


def norm_of(module: nn.Module | None) -> NormFacts | None:
    """The norm that `module` computes, or None for an unknown one."""
    weight = getattr(module, "weight", None)
    if module is None or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    x = torch.linspace(-2.0, 3.0, len(weight), dtype=torch.float32, device=weight.device).sin().mul(1.7).add(0.3)
    x = torch.stack([x, x * 1e-3]).to(weight.dtype)  # small numbers reveal eps
    try:
        expected = module(x).float()
    except Exception:
        return None
    for facts in _norm_candidates(module, weight):
        if expected.shape == x.shape and _close(_norm(facts, x.float()), expected, weight.dtype):
            return facts
    return None


def activation_of(module: Callable[[Tensor], Tensor] | None) -> str | None:
    """The name of the activation that `module` computes, or None for an unknown one."""
    if module is None:
        return None
    x = torch.linspace(-6.0, 6.0, 64, dtype=torch.float32, device="cpu")
    try:
        expected = module(x)
    except Exception:
        return None
    matches = (name for name, function in ACTIVATIONS.items() if torch.allclose(function(x), expected, atol=1e-6))
    return next(matches, None)


def _norm_candidates(module: nn.Module, weight: nn.Parameter) -> Iterator[NormFacts]:
    eps, bias = next(_epsilons(module), 1e-6), module._parameters.get("bias")
    bias_floats, of_bias = (None, None) if bias is None else (_floats(bias.detach()), Recipe.of(bias, _floats))
    for kind in (RMS, LAYER):
        for transform in (_floats, _one_more):
            recipes = Recipe.of(weight, transform), of_bias
            yield NormFacts(kind, transform(weight.detach()), bias_floats, eps, recipes)


def _floats(x: Tensor) -> Tensor:
    return x.float()


def _one_more(x: Tensor) -> Tensor:
    return x.float() + 1.0


def _epsilons(module: nn.Module) -> Iterator[float]:
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            yield value


def _norm(facts: NormFacts, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if facts.kind == LAYER else x
    scaled = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + facts.eps) * facts.weight
    return scaled if facts.bias is None else scaled + facts.bias


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    limits = tolerance * expected.abs().amax(-1).clamp(min=1e-3)
    return bool(((actual - expected).abs().amax(-1) <= limits).all())

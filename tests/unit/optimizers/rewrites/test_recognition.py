"""What a module computes is found by trying it, not by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from penstock.kernels.products import LAYER, RMS
from penstock.optimizers.rewrites.recognition import NormFacts, activation_of, norm_of

WEIGHT = torch.linspace(-1, 2, 24)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    module.weight.data = WEIGHT.clone()
    return module.to(dtype)


def found_in(module: nn.Module) -> NormFacts:
    facts = norm_of(module)
    assert facts is not None
    return facts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_keeps_its_weight_and_eps(dtype: torch.dtype) -> None:
    facts = found_in(with_weight(LlamaRMSNorm(24, eps=1e-4), dtype))
    assert (facts.kind, facts.bias, facts.eps) == (RMS, None, 1e-4)
    assert torch.equal(facts.weight, WEIGHT.to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemmas_norm_multiplies_by_one_more_than_its_weight(dtype: torch.dtype) -> None:
    facts = found_in(with_weight(Gemma2RMSNorm(24), dtype))
    assert facts.kind == RMS
    assert torch.equal(facts.weight, WEIGHT.to(dtype).float() + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_may_have_a_bias(dtype: torch.dtype) -> None:
    module = with_weight(nn.LayerNorm(24, eps=1e-3), dtype)
    module.bias.data += 0.5
    facts = found_in(module)
    assert (facts.kind, facts.eps) == (LAYER, 1e-3)
    assert facts.bias is not None
    assert facts.bias.eq(0.5).all()
    assert found_in(with_weight(nn.LayerNorm(24, bias=False), dtype)).bias is None


class Named(nn.Module):
    """A module with a norm's weight that computes something else."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps, self.function = nn.Parameter(WEIGHT.clone()), eps, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def test_what_is_no_norm_is_none() -> None:
    assert norm_of(None) is None
    assert norm_of(nn.Linear(24, 24)) is None
    assert norm_of(nn.SiLU()) is None
    assert norm_of(Named(lambda x, w: x / x.abs().mean(-1, keepdim=True) * w)) is None
    assert norm_of(Named(lambda x, w: F.rms_norm(x, (24,), w, 1e-6).sum(-1))) is None
    assert norm_of(Named(lambda x, w: x.missing)) is None


def test_a_norm_whose_eps_is_not_the_one_it_names_is_none() -> None:
    """Among numbers of ordinary size no eps shows; a layer that makes them small would be off."""
    assert norm_of(Named(lambda x, w: F.rms_norm(x, (24,), w, 1e-6), eps=1e-6)) is not None
    assert norm_of(Named(lambda x, w: F.rms_norm(x, (24,), w, 1e-5), eps=1e-6)) is None


@pytest.mark.parametrize(
    ("known_as", "name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("linear", "identity"),
        ("quick_gelu", None),
        ("relu2", None),
        ("tanh", None),
    ],
)
def test_activations_are_known_by_their_values(known_as: str, name: str | None) -> None:
    assert activation_of(ACT2FN[known_as]) == name


def test_no_activation_and_one_that_fails_are_none() -> None:
    assert activation_of(None) is None
    assert activation_of(lambda x: x.missing) is None

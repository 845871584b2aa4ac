"""Objects of the kernels made from the weights of modules, each with the packed unit that writes it again.

Owns nothing. Called by the passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.kernels.native import Kernels
from penstock.kernels.products import STORE_ONLY, Epilogue, Linear, Norm
from penstock.optimizers.rewrites.layer_parts import LinearWeights
from penstock.optimizers.rewrites.recipes import PackedUnit
from penstock.optimizers.rewrites.recognition import NormFacts


def packed_linear(
    kernels: Kernels,
    weights: Sequence[LinearWeights],
    quantize: bool,
    *,
    norm: Norm | None = None,
    epilogue: Epilogue = STORE_ONLY,
) -> tuple[Linear, PackedUnit]:
    """The product with these matrices, which all have the same inputs, one below the other."""
    linear = Linear(
        kernels,
        [part.weight for part in weights],
        [part.bias for part in weights],
        norm=norm,
        quantize=quantize,
        calibration=weights[0].calibration,
        epilogue=epilogue,
    )
    count = len(weights)
    recipes = [part.recipes[i] for i in (0, 1) for part in weights]
    return linear, PackedUnit(recipes, lambda tensors: linear.write(tensors[:count], tensors[count:]), linear)


def packed_norm(kernels: Kernels, facts: NormFacts, dtype: torch.dtype, scale: float = 1.0) -> tuple[Norm, PackedUnit]:
    """The norm of rows of `dtype`, with a factor for what it adds."""
    norm = Norm(kernels, facts.kind, facts.weight, facts.bias, facts.eps, dtype, scale)
    return norm, PackedUnit(facts.recipes, lambda tensors: norm.write(*tensors))

"""The passes `packed_linears` and `packed_norms`: what no fused layer took becomes single calls of compiled kernels.

Owns the replacement modules. A linear module becomes `PackedLinear`, the output head gives float32 logits; a norm that
is known becomes `PackedNorm`. Called by `rewriting`, once per load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from penstock.kernels.native import TYPES, Kernels
from penstock.kernels.products import Linear, Norm
from penstock.optimizers.rewrites.layer_parts import Matrix, matrix_of
from penstock.optimizers.rewrites.memory_pool import MemoryPool
from penstock.optimizers.rewrites.recognition import norm_of

MIN_WEIGHTS = 256  # routers and other crumbs stay as they are


class PackedLinear(nn.Module):
    """x W^T + b for x [..., K], in x's dtype; or in `out_dtype`, in memory that `workspaces` lends for the step."""

    def __init__(
        self,
        kernels: Kernels,
        matrix: Matrix,
        quantize: bool,
        out_dtype: torch.dtype | None = None,
        workspaces: MemoryPool | None = None,
    ) -> None:
        super().__init__()
        self._dtype = matrix.weight.dtype
        self._linear = Linear(kernels, [matrix.weight], [matrix.bias], quantize=quantize, out_dtype=out_dtype)
        self.num_bytes = self._linear.num_bytes
        self.in_features, self.out_features = self._linear.k, self._linear.n
        self._out_dtype, self._workspaces = out_dtype, workspaces

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        rows = x.reshape(-1, x.shape[-1]).to(self._dtype)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        lent: Tensor | None = None  # fresh memory of the size of logits would be zeroed page by page
        if self._workspaces is not None:
            lent = self._workspaces.get_tensor((len(rows), self.out_features), self._out_dtype)
        return self._linear(rows, lent).view(*x.shape[:-1], self.out_features)


class PackedNorm(nn.Module):
    """A norm over the last dimension."""

    def __init__(self, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        self._norm, self._dtype = norm, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        rows = x.reshape(-1, x.shape[-1]).to(self._dtype).contiguous()
        return self._norm(rows).view(x.shape)


def pack_linears(module: nn.Module, kernels: Kernels, quantize: bool, workspaces: MemoryPool | None) -> int:
    """Replace every plain linear module, in place; how many. The output head gives float32, lent for a step.

    What a layer picks by name when it runs stays as it is: layers with adapters look at their weights.
    """
    head = module.get_output_embeddings()  # type: ignore[operator]

    def packed(found: nn.Module) -> nn.Module | None:
        matrix = matrix_of(found)
        if matrix is None or not _fits(matrix.weight):
            return None
        if found is head:
            return PackedLinear(kernels, matrix, quantize, torch.float32, workspaces)
        return PackedLinear(kernels, matrix, quantize)

    return _replace(module, packed)


def pack_norms(module: nn.Module, kernels: Kernels) -> int:
    """Replace every norm whose kind is known, in place; how many."""

    def packed(found: nn.Module) -> nn.Module | None:
        facts = norm_of(found) if not list(found.children()) else None
        if facts is None:
            return None
        dtype = found.weight.dtype
        return PackedNorm(Norm(kernels, facts.kind, facts.weight, facts.bias, facts.eps, dtype), dtype)  # type: ignore[arg-type]

    return _replace(module, packed)


def _fits(weight: Tensor) -> bool:
    known = weight.dtype in TYPES and weight.dtype != torch.int8 and weight.device.type == "cpu"
    return known and weight.numel() >= MIN_WEIGHTS


def _replace(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put `make(child)` in the place of every submodule for which it makes one."""
    count = 0
    for parent in [part for part in module.modules() if not isinstance(part, nn.ModuleDict)]:
        for name, child in list(parent.named_children()):
            made = make(child)
            if made is not None:
                parent.add_module(name, made)
                count += 1
    return count

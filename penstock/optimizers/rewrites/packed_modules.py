"""The passes `packed_linears` and `packed_norms`: modules outside fused layers become single calls of compiled kernels.

Owns the replacement modules. A linear module becomes a `PackedLinear`, as output head with float32 logits; a norm that
is recognised becomes a `PackedNorm`. Called by `passes`, once per load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from penstock.kernels.native import TYPES, Kernels
from penstock.kernels.products import Epilogue
from penstock.optimizers.rewrites.layer_parts import LinearWeights, linear_weights_of
from penstock.optimizers.rewrites.memory_pool import MemoryPool
from penstock.optimizers.rewrites.packing import packed_linear, packed_norm
from penstock.optimizers.rewrites.recognition import NormFacts, norm_of

MIN_WEIGHTS = 256  # routers and other small matrices stay as they are


class PackedLinear(nn.Module):
    """x W^T + b for x [..., K], in x's dtype; or in `out_dtype`, in memory of `workspaces`, valid for the step."""

    def __init__(
        self,
        kernels: Kernels,
        weights: LinearWeights,
        quantize: bool,
        out_dtype: torch.dtype | None = None,
        workspaces: MemoryPool | None = None,
    ) -> None:
        super().__init__()
        self._dtype = weights.weight.dtype
        self._linear, unit = packed_linear(kernels, [weights], quantize, epilogue=Epilogue(dtype=out_dtype))
        self.packed_units, self.num_bytes = [unit], self._linear.num_bytes
        self.in_features, self.out_features = self._linear.k, self._linear.n
        self._out_dtype, self._workspaces = out_dtype, workspaces

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        rows = x.reshape(-1, x.shape[-1]).to(self._dtype)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        output: Tensor | None = None  # new memory of the size of logits would be zeroed page by page
        if self._workspaces is not None:
            output = self._workspaces.get_tensor((len(rows), self.out_features), self._out_dtype)
        return self._linear(rows, output).view(*x.shape[:-1], self.out_features)


class PackedNorm(nn.Module):
    """A norm over the last dimension."""

    def __init__(self, kernels: Kernels, facts: NormFacts, dtype: torch.dtype) -> None:
        super().__init__()
        self._norm, unit = packed_norm(kernels, facts, dtype)
        self._dtype, self.packed_units = dtype, [unit]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        rows = x.reshape(-1, x.shape[-1]).to(self._dtype).contiguous()
        return self._norm(rows).view(x.shape)


def pack_linears(module: nn.Module, kernels: Kernels, quantize: bool, workspaces: MemoryPool | None) -> int:
    """Replace every plain linear module in place; how many. The output head gives float32, valid for one step.

    Modules in a `ModuleDict` stay as they are: layers with adapters select them by name and read their weights.
    """
    head = module.get_output_embeddings()  # type: ignore[operator]

    def packed(part: nn.Module) -> nn.Module | None:
        weights = linear_weights_of(part)
        if weights is None or not _is_supported(weights.weight):
            return None
        if part is head:
            return PackedLinear(kernels, weights, quantize, torch.float32, workspaces)
        return PackedLinear(kernels, weights, quantize)

    return _replace(module, packed)


def pack_norms(module: nn.Module, kernels: Kernels) -> int:
    """Replace every norm that is recognised, in place; how many."""

    def packed(part: nn.Module) -> nn.Module | None:
        facts = norm_of(part) if not list(part.children()) else None
        return None if facts is None else PackedNorm(kernels, facts, part.weight.dtype)  # type: ignore[arg-type]

    return _replace(module, packed)


def _is_supported(weight: Tensor) -> bool:
    has_kernel = weight.dtype in TYPES and weight.dtype != torch.int8 and weight.device.type == "cpu"
    return has_kernel and weight.numel() >= MIN_WEIGHTS


def _replace(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Replace every submodule by `make(submodule)` where that is not None; how many."""
    count = 0
    for parent in [part for part in module.modules() if not isinstance(part, nn.ModuleDict)]:
        for name, child in list(parent.named_children()):
            replacement = make(child)
            if replacement is not None:
                parent.add_module(name, replacement)
                count += 1
    return count

"""Rewrites a loaded model for the CPU kernels: `rewrite` runs the passes, `PASSES` describes them by name.

Owns the order of the passes and the report. A pass verifies itself or is verified by the caller, who compares the
logits before and after. Packed weights are copies, which `recipes` writes again after an update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor, nn

from penstock.kernels.native import Kernels
from penstock.optimizers.rewrites.fusion import ProbedAttention, fuse_layers
from penstock.optimizers.rewrites.memory_pool import MemoryPool
from penstock.optimizers.rewrites.packed_modules import pack_linears, pack_norms

PASSES = {
    "fused_layers": "decoder layers as one kernel call: packed products with norms, activations and residuals inside",
    "packed_linears": "the remaining linear modules, the output head among them, with packed weights",
    "packed_norms": "the remaining RMSNorm and LayerNorm modules as one kernel call",
}


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass replaced `num_replaced` of `num_candidates` modules (0 if it does not count them) in `seconds`."""

    name: str
    num_replaced: int
    num_candidates: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name} {self.num_replaced}" + (f"/{self.num_candidates}" if self.num_candidates else "")


def rewrite(
    module: nn.Module,
    probed: ProbedAttention,
    kernels: Kernels,
    run: Callable[[], Tensor],
    *,
    quantize: bool = False,
    disabled: Collection[str] = (),
    workspaces: MemoryPool | None = None,
) -> list[PassReport]:
    """Rewrite `module` in place, without the `disabled` passes; a report of each pass.

    With `workspaces`, logits lie in memory of that pool and are valid until the end of the step.
    """
    passes: dict[str, Callable[[], tuple[int, int]]] = {
        "fused_layers": lambda: fuse_layers(module, probed, kernels, quantize, run),
        "packed_linears": lambda: (pack_linears(module, kernels, quantize, workspaces), 0),
        "packed_norms": lambda: (pack_norms(module, kernels), 0),
    }
    reports = []
    for name, apply in passes.items():
        if name in disabled:
            continue
        start = time.perf_counter()
        num_replaced, num_candidates = apply()
        reports.append(PassReport(name, num_replaced, num_candidates, time.perf_counter() - start))
    return reports

"""Rewrites a loaded model for the CPU kernels: `rewrite` runs the passes by name, `PASSES` lists them.

Owns the order of the passes and the report; each pass verifies itself or is verified by the caller, who compares
logits before and after. Only for models that the engine itself loaded: packed weights are copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor, nn

from penstock.kernels.native import Kernels
from penstock.optimizers.rewrites.fusion import Probed, fuse_layers
from penstock.optimizers.rewrites.memory_pool import MemoryPool
from penstock.optimizers.rewrites.packed_modules import pack_linears, pack_norms

PASSES = {
    "fused_layers": "decoder layers as one kernel call: packed products with norms, activations and residuals inside",
    "packed_linears": "the remaining linear modules, the output head among them, with packed weights",
    "packed_norms": "the remaining RMSNorm and LayerNorm modules as one kernel call",
}


@dataclass(frozen=True, slots=True)
class Applied:
    """What one pass did: `changed` of `seen` places (0 seen: it does not count them), in `seconds`."""

    name: str
    changed: int
    seen: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name} {self.changed}" + (f"/{self.seen}" if self.seen else "")


def rewrite(
    module: nn.Module,
    probed: Probed,
    kernels: Kernels,
    run: Callable[[], Tensor],
    *,
    quantize: bool = False,
    without: Collection[str] = (),
    workspaces: MemoryPool | None = None,
) -> list[Applied]:
    """Rewrite `module` in place, leaving out the passes in `without`; what each pass did.

    With `workspaces`, logits lie in memory that these lend until the step is over.
    """
    passes: dict[str, Callable[[], tuple[int, int]]] = {
        "fused_layers": lambda: fuse_layers(module, probed, kernels, quantize, run),
        "packed_linears": lambda: (pack_linears(module, kernels, quantize, workspaces), 0),
        "packed_norms": lambda: (pack_norms(module, kernels), 0),
    }
    report = []
    for name, apply in passes.items():
        if name in without:
            continue
        begin = time.perf_counter()
        changed, seen = apply()
        report.append(Applied(name, changed, seen, time.perf_counter() - begin))
    return report

"""A model after a load's steps: probed, rewritten, its logits compared."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penstock.kernels.native import Kernels
from penstock.models.checks import ProbeResult, compare, probe, trial_pass
from penstock.models.panels import PanelBackend
from penstock.optimizers.rewrites.calibration import calibrated
from penstock.optimizers.rewrites.passes import PassReport, rewrite

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rewritten:
    """The module, rewritten in place, what each pass did, and the logits it had for the probe's tokens."""

    module: nn.Module
    reports: dict[str, PassReport]
    probed: ProbeResult
    paging: PanelBackend

    @property
    def own_logits(self) -> Tensor:
        """What the module computed before."""
        assert self.probed.reference is not None
        return self.probed.reference

    def compare(self, tolerance: float) -> None:
        """Raises `ConfigurationError` where logits are off by more than this share of the largest."""
        compare(self.module, self.probed, self.paging, tolerance=tolerance)

    def logits(self, ids: Tensor) -> Tensor:
        """The logits [T, vocab] for tokens [T]."""
        return trial_pass(self.module, self.probed, self.paging, CPU, ids)

    def count(self, kind: type[nn.Module]) -> int:
        """How many modules of a kind there are."""
        return sum(isinstance(module, kind) for module in self.module.modules())


def rewritten(
    module: Any,
    kernels: Kernels,
    *,
    quantize: bool = False,
    text_ids: Tensor | None = None,
    disabled: Collection[str] = (),
) -> Rewritten:
    """Rewrite `module`, as a load would."""
    with torch.inference_mode():
        probed, paging = probe(module, CPU, verify=True), PanelBackend(kernels, False)
        text = (
            nullcontext()
            if text_ids is None
            else calibrated(module, lambda: trial_pass(module, probed, paging, CPU, text_ids))
        )
        with text:
            reports = rewrite(
                module,
                probed,
                kernels,
                lambda: trial_pass(module, probed, paging, CPU),
                quantize=quantize,
                disabled=disabled,
            )
    return Rewritten(module, {report.name: report for report in reports}, probed, paging)

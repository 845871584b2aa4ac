"""`calibrated`: records the inputs of each linear module in a pass over a text, for the rounding of int8 weights.

Owns nothing that outlives the rewrites: modules have a `calibration` while they run. Used by a load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.kernels.products import Calibration
from penstock.optimizers.rewrites.layer_parts import is_linear


@contextmanager
def calibrated(module: nn.Module, run_text: Callable[[], Tensor]) -> Iterator[None]:
    """Within the context each linear module has a `calibration` with the inputs that it had in `run_text`."""
    recorder = _Recorder(cast(PreTrainedModel, module).get_output_embeddings())
    linears = [part for part in module.modules() if is_linear(part)]
    hooks = [part.register_forward_pre_hook(recorder) for part in linears]
    try:
        run_text()
        for hook in hooks:
            hook.remove()
        yield
    finally:
        for hook, part in zip(hooks, linears, strict=True):
            hook.remove()
            part.__dict__.pop("calibration", None)


class _Recorder:
    """A forward pre-hook that calibrates modules; those with the same input share the result."""

    def __init__(self, head: nn.Module | None) -> None:
        self._head = head
        self._latest: tuple[Tensor, Calibration] | None = None

    def __call__(self, part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Calibrate `part`. The head continues with the last token alone: nobody reads the other logits."""
        if not args:
            return None
        x, *others = args
        if x.numel() and x.isfinite().all():
            if self._latest is None or self._latest[0] is not x:
                self._latest = x, Calibration.of(x.flatten(0, -2))
            part.__dict__["calibration"] = self._latest[1]
        return (x[..., -1:, :], *others) if part is self._head else None

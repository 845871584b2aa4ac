"""`DraftRunner`: runs a draft model for its most likely tokens alone, with as little Python as it can do with.

Owns what `Executor` owns. A draft model computes so little that its Python would take most of a step: no sampler runs,
and where the layers are fused and the logits stay the same, nor does the model's own Python around them. Called by the
drafter on the model's thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from penstock.models.attention import Paged
from penstock.models.executor import Executor
from penstock.models.layout import StepLayout
from penstock.optimizers.fused import FusedLayer
from penstock.sampling import SamplingParams
from penstock.step import Row, StepPlan

# A pass: logits [wanted places, vocab].
Body = Callable[[StepLayout, Paged], Tensor]
_TRIAL_TOKENS = (8, 9)  # the trial reads so many, then one more


class DraftRunner(Executor):
    """An executor that guesses."""

    _body: Body | None = None

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        """As `Executor.allocate`; then sees whether the model's own Python can be done without."""
        super().allocate(num_blocks, block_size, num_host_blocks)
        longest = min(self.spec.max_length, num_blocks * block_size)
        if longest >= _TRIAL_TOKENS[1]:
            with suppress(Exception), torch.inference_mode():  # whatever goes wrong, the model runs as it is
                body = lean_body(self._module, longest)
                self._body = body if body is not None and self._gives_the_same(body, block_size) else None
            self._workspaces.return_all()

    @property
    def is_lean(self) -> bool:
        """Whether passes go without the model's own Python."""
        return self._body is not None

    def guess(self, plan: StepPlan) -> list[tuple[int, float] | None]:
        """The most likely next token of each row that samples, and its probability; None for the others.

        None, too, where the logits are not numbers.

        Raises `OutOfMemory` or `ExecutionError`.
        """
        with self._passing():
            logits = self._forward(plan).float()
            best = logits.max(-1)
            sure = (best.values - logits.logsumexp(-1)).exp()
            pairs = zip(best.indices.tolist(), sure.tolist(), strict=True)
            found = iter([pair if isfinite(pair[1]) else None for pair in pairs])
        return [next(found) if row.samples else None for row in plan.rows]

    def _run(self, layout: StepLayout) -> Tensor:
        if self._body is None:
            return super()._run(layout)
        return self._body(layout, self._paging.attention(self._storage, layout, self._layers))

    def _gives_the_same(self, body: Body, block_size: int) -> bool:
        """Compare the logits of two small steps."""
        tokens, start = [token % self.spec.vocab_size for token in range(11, 11 + _TRIAL_TOKENS[1])], 0
        blocks = array("i", range(-(-len(tokens) // block_size)))
        for end in _TRIAL_TOKENS:
            row = Row(0, tokens, start, end, blocks, True, SamplingParams(), end)
            layout, start = StepLayout((row,), block_size, self._device), end
            own = super()._run(layout)
            lean = body(layout, self._paging.attention(self._storage, layout, self._layers))
            if not torch.equal(own, lean):
                return False
        return True


def lean_body(module: nn.Module, longest: int) -> Body | None:
    """The pass of a decoder with rotary positions whose layers are all fused; None for any other structure.

    `longest` is the most positions it will see.
    """
    decoder: Any = getattr(module, "model", None)
    head: Any = getattr(module, "lm_head", None)
    names = ("embed_tokens", "layers", "norm", "rotary_emb")
    if head is None or not all(hasattr(decoder, name) for name in names):
        return None
    layers = list(decoder.layers)
    if not layers or not all(isinstance(layer, FusedLayer) for layer in layers):
        return None
    weight: Tensor = decoder.embed_tokens.weight
    cos, sin = decoder.rotary_emb(
        weight[None, :1], torch.arange(longest, dtype=torch.int64, device=weight.device)[None]
    )

    def run(layout: StepLayout, paged: Paged) -> Tensor:
        hidden = embedding(layout.input_ids[None], weight)
        rotation = cos[:, layout.positions], sin[:, layout.positions]
        for layer in layers:
            hidden = layer.forward(hidden, paged=paged, position_embeddings=rotation)
        if len(layout.logit_places) < len(layout.input_ids):
            hidden = hidden[:, layout.logit_places]
        logits: Tensor = head.forward(decoder.norm.forward(hidden))[0]
        return logits

    return run

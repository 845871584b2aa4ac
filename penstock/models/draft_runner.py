"""`DraftRunner`: runs a draft model for its most likely tokens alone, with as little Python as possible.

Owns what `Executor` owns. A draft model computes so little that Python would take most of a step: no sampler runs, and
where the layers are fused and the logits stay the same, the model's own Python around them does not run either. Called
by the drafter on the model's thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from penstock.kernels.program import Paged
from penstock.models.attention import StepAttention
from penstock.models.executor import Executor
from penstock.models.layout import StepLayout
from penstock.optimizers.rewrites.fused_layer import FusedLayer
from penstock.sampling import SamplingParams
from penstock.step import Row, StepPlan

# A forward pass: logits [L, vocab].
Forward = Callable[[StepLayout, StepAttention], Tensor]
_TRIAL_LENGTHS = (8, 9)  # the trial computes 8 tokens, then one more


class DraftRunner(Executor):
    """An executor that guesses."""

    _lean: Forward | None = None

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        """As `Executor.allocate`; then finds out whether the model's own Python can be left out."""
        super().allocate(num_blocks, block_size, num_host_blocks)
        max_length = min(self.spec.max_length, num_blocks * block_size)
        if max_length >= _TRIAL_LENGTHS[-1]:
            with suppress(Exception), torch.inference_mode():  # whatever goes wrong, the model runs as it is
                lean = lean_forward(self._module, max_length)
                self._lean = lean if lean is not None and self._agrees(lean, block_size) else None
            self._workspaces.return_all()

    @property
    def is_lean(self) -> bool:
        """Whether forward passes leave out the model's own Python."""
        return self._lean is not None

    def guess(self, plan: StepPlan) -> list[tuple[int, float] | None]:
        """The most likely next token of each row that samples, and its probability.

        None for rows that do not sample, and where the logits are not numbers. Raises `OutOfMemory` or
        `ExecutionError`.
        """
        logits = self.launch(plan).logits
        with self.contained():
            logits = logits.float()
            best = logits.max(-1)
            probabilities = (best.values - logits.logsumexp(-1)).exp()
            pairs = zip(best.indices.tolist(), probabilities.tolist(), strict=True)
            guesses = iter([pair if isfinite(pair[1]) else None for pair in pairs])
            self._workspaces.return_all()
        return [next(guesses) if row.samples else None for row in plan.rows]

    def compute(self, layout: StepLayout, attention: StepAttention) -> Tensor:
        """Logits [L, vocab], without the model's own Python where that gives the same."""
        return (self._lean or super().compute)(layout, attention)

    def _agrees(self, lean: Forward, block_size: int) -> bool:
        """Whether the logits of two small steps are the same bits as the model's own."""
        assert self._storage is not None
        tokens, start = [token % self.spec.vocab_size for token in range(11, 11 + _TRIAL_LENGTHS[-1])], 0
        blocks = array("i", range(-(-len(tokens) // block_size)))
        for end in _TRIAL_LENGTHS:
            row = Row(0, tokens, start, end, blocks, True, SamplingParams(), end)
            layout, start = StepLayout.of((row,), block_size, self._device), end
            attention = self._storage.attention(layout, self._layers)
            if not torch.equal(super().compute(layout, attention), lean(layout, attention)):
                return False
        return True


class _Decoder(Protocol):
    """The decoder of a transformers model with rotary positions."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module


def lean_forward(module: nn.Module, max_length: int) -> Forward | None:
    """The forward pass of a decoder with rotary positions whose layers are all fused; None for any other structure.

    `max_length` is the most positions it will see.
    """
    model: nn.Module | None = getattr(module, "model", None)
    head: nn.Module | None = getattr(module, "lm_head", None)
    if head is None or not all(hasattr(model, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return None
    decoder = cast(_Decoder, model)
    layers = [layer for layer in decoder.layers if isinstance(layer, FusedLayer)]
    if not layers or len(layers) < len(decoder.layers):
        return None
    weight, norm = decoder.embed_tokens.weight, decoder.norm
    all_positions = torch.arange(max_length, dtype=torch.int64, device=weight.device)
    cos, sin = decoder.rotary_emb(weight[None, :1], all_positions[None])

    def forward(layout: StepLayout, attention: StepAttention) -> Tensor:
        hidden = embedding(layout.input_ids[None], weight)
        angles = cos[:, layout.positions], sin[:, layout.positions]
        paged = cast(Paged, attention)  # fused layers run on panels
        for layer in layers:
            hidden = layer.forward(hidden, paged=paged, position_embeddings=angles)
        if len(layout.logit_indices) < len(layout.input_ids):
            hidden = hidden[:, layout.logit_indices]
        logits: Tensor = head.forward(norm.forward(hidden))[0]
        return logits

    return forward

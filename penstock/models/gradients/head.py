"""`Head`: log probabilities from final hidden states, a chunk of positions at a time, with gradients.

The chunk's logits are computed again in the backward pass, so logits of all positions never exist at once. What a model
does to its logits (scales, soft caps) is done by the model's own forward pass, with the decoder's output given.
Called by `scorer`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from penstock.errors import ConfigurationError
from penstock.models.checks import vocab_size


class _GivenOutput(nn.Module):
    """Stands in for a decoder whose output is known, but for the hidden states, [1, T, H]."""

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self._output = dict(output)
        self._kind = type(output)
        self.states = torch.empty(0, dtype=torch.float32, device="cpu")

    def forward(self, *_: object, **__: object) -> ModelOutput:
        return self._kind(**{**self._output, "last_hidden_state": self.states})


class Head:
    """The part of a causal language model after its decoder; `view` is changed and cannot run its decoder again."""

    def __init__(self, view: nn.Module, output: ModelOutput, ids: Tensor, chunk_bytes: int) -> None:
        self._view = view
        self._ids = ids[None, :1]  # some models look at the shape of their input
        self._given = _GivenOutput(output)
        self._chunk_rows = max(1, chunk_bytes // (4 * vocab_size(view)))
        _replace_decoder(view, self._given)

    def logits(self, states: Tensor) -> Tensor:
        """The model's logits [T, vocab] for hidden states [T, H]."""
        self._given.states = states[None]
        logits: Tensor = self._view(input_ids=self._ids, use_cache=False).logits
        return logits[0]

    def logprobs(self, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log probability of each target [T] and entropy, both float32 [T]."""
        if not len(targets):
            return states.new_zeros(0, dtype=torch.float32), states.new_zeros(0, dtype=torch.float32)
        chunks = [
            checkpoint(self._chunk, *pair, temperature, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(states.split(self._chunk_rows), targets.split(self._chunk_rows), strict=True)
        ]
        logprobs, entropies = zip(*chunks, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def target_logprobs(self, states: Tensor, targets: Tensor) -> Tensor:
        """Log probabilities, float32 [T, K], of K targets after each of T hidden states, int64 [T, K]."""
        pairs = zip(states.split(self._chunk_rows), targets.split(self._chunk_rows), strict=True)
        chunks = [checkpoint(self._targets, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
        return torch.cat(chunks)

    def _targets(self, states: Tensor, targets: Tensor) -> Tensor:
        return self.logits(states).float().log_softmax(-1).gather(-1, targets)

    def _chunk(self, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs = (self.logits(states).float() / temperature).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropies


def _replace_decoder(view: nn.Module, replacement: nn.Module) -> None:
    decoder = cast(PreTrainedModel, view).get_decoder()
    for part in list(view.modules()):
        for name, child in part.named_children():
            if child is decoder:
                part._modules[name] = replacement
                return
    raise ConfigurationError(f"{type(view).__name__} cannot be scored with gradients: its decoder was not found in it")

"""Grammar masks on logits: which tokens of each row may follow, and minus infinity for every other.

Pure functions of tensors, vectorised over rows. Called by the sampler after every other rule, so that no rule and no
processor brings back a token that the grammar refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.constraints.masks import Masks
from penstock.errors import RequestError
from penstock.step import Row

_BYTE = 8


def mask_errors(rows: Sequence[Row], masks: Masks) -> dict[int, RequestError]:
    """The errors of constraints that failed, by row."""
    constrained = [i for i, row in enumerate(rows) if row.constraint is not None]
    return {i: error for i in constrained if (error := masks.error(rows[i])) is not None}


def mask_rows(rows: Sequence[Row], masks: Masks) -> Tensor:
    """The mask of each row, int32 [R, W] on the CPU; of a row without a constraint, one that allows every token."""
    all_bits = torch.frombuffer(masks.bits, dtype=torch.int32).view(-1, masks.num_words)
    indices = [masks.index(row) for row in rows if row.constraint is not None]
    if len(indices) == len(rows):
        return all_bits[torch.tensor(indices, dtype=torch.int64, device="cpu")]
    bits = torch.full((len(rows), masks.num_words), -1, dtype=torch.int32, device="cpu")
    places = [i for i, row in enumerate(rows) if row.constraint is not None]
    bits[places] = all_bits[indices]
    return bits


def rule_out(logits: Tensor, rows: Sequence[Row], masks: Masks) -> None:
    """Rule out what the masks refuse, in `logits` float32 [R, V], in place. Every row has a constraint."""
    penalties = F.embedding(mask_rows(rows, masks).view(torch.uint8).int(), _penalties_by_byte()).flatten(1)
    width = min(logits.shape[1], penalties.shape[1])
    logits[:, :width] += penalties[:, :width].to(logits.device)
    logits[:, width:] = -torch.inf


def _penalties_by_byte() -> Tensor:
    """For each value of a byte, 0 or -inf for each of its 8 tokens: float32 [256, 8]."""
    values = torch.arange(256, dtype=torch.int64, device="cpu")[:, None]
    places = torch.arange(_BYTE, dtype=torch.int64, device="cpu")
    return torch.zeros(256, _BYTE, dtype=torch.float32, device="cpu").masked_fill_(
        (values >> places) & 1 == 0, -torch.inf
    )

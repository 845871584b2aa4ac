"""Grammar masks on logits: bits of tokens to minus infinity for every token that may not follow.

A pure function of tensors, vectorised over rows. Called by the sampler after every other rule, so that no rule and no
processor brings back a token that the grammar refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.constraints.masks import Masks
from penstock.errors import RequestError
from penstock.step import Row

_BYTE = 8


def apply_masks(logits: Tensor, rows: Sequence[Row], masks: Masks) -> dict[int, RequestError]:
    """Rule out what the masks refuse, in `logits` float32 [R, V], in place; rows without a constraint are untouched.

    Returns the errors of constraints that failed, by row.
    """
    members = [i for i, row in enumerate(rows) if row.constraint is not None]
    errors: dict[int, RequestError] = {i: error for i in members if (error := masks.error(rows[i])) is not None}
    if members:
        all_bits = torch.frombuffer(masks.bits, dtype=torch.uint8).view(-1, masks.num_words * 4)
        bits = all_bits[[masks.index(rows[i]) for i in members]]
        refused = _refused_by_byte()[bits.long()].view(torch.bool).flatten(1)
        _rule_out(logits, members, refused.to(logits.device))
    return errors


def _rule_out(logits: Tensor, members: list[int], refused: Tensor) -> None:
    """`refused` bool [M, W] for the rows `members`; every token from W on is refused."""
    width = min(logits.shape[1], refused.shape[1])
    if len(members) == len(logits):
        logits[:, :width].masked_fill_(refused[:, :width], -torch.inf)
        logits[:, width:] = -torch.inf
        return
    index = torch.tensor(members, dtype=torch.int64, device=logits.device)
    masked = logits[index]
    masked[:, :width].masked_fill_(refused[:, :width], -torch.inf)
    masked[:, width:] = -torch.inf
    logits[index] = masked


def _refused_by_byte() -> Tensor:
    """For each value of a byte, the 8 tokens that it refuses as 8 bools, packed: int64 [256]."""
    values = torch.arange(256, dtype=torch.int64, device="cpu")[:, None]
    places = torch.arange(_BYTE, dtype=torch.int64, device="cpu")
    return ((values >> places) & 1 == 0).view(torch.int64)[:, 0]

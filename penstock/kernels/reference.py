"""Hot operations in plain torch, on any device: the oracle that faster versions are held against.

Owns no state; every tensor it writes is an argument. Called by the attention of `models`. Shape legend:
S cache slots, T tokens of the step, B rows, L context length (padded), N queries of one row, H query heads,
K key/value heads, G = H / K query heads per key/value head, D head size of keys, V head size of values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def write_kv(keys_S_K_D: Tensor, values_S_K_V: Tensor, slots_T: Tensor, key_T_K_D: Tensor, value_T_K_V: Tensor) -> None:
    """Store the step's keys and values at their cache slots, in place.

    Infinities in keys become NaN: scores would be -inf, which is no attention, or finite under a soft cap.
    """
    keys_S_K_D.index_copy_(0, slots_T, key_T_K_D.nan_to_num(torch.nan, torch.nan, torch.nan))
    values_S_K_V.index_copy_(0, slots_T, value_T_K_V)


def copy_slots(cache_S_K_D: Tensor, source: Tensor, destination: Tensor) -> None:
    """Copy cache slots, in place; `source` and `destination` are int64 and do not overlap."""
    cache_S_K_D.index_copy_(0, destination, cache_S_K_D.index_select(0, source))


def gather_slots(cache_S_K_D: Tensor, slots: Tensor) -> Tensor:
    """Read slots of any index shape [...] as [..., K, D]."""
    rows = cache_S_K_D.index_select(0, slots.reshape(-1))
    return rows.view(*slots.shape, *cache_S_K_D.shape[1:])


def mute_broken(key_L_K_D: Tensor, value_L_K_V: Tensor) -> Tensor:
    """Let no NaN or infinity of a token reach those who do not see it: 0 instead, in place. [L]: NaN for such a token.

    A masked place takes part in the sums with a weight of 0, which NaN and infinities survive. The others get 0.
    """
    broken = (key_L_K_D * 0).sum((1, 2)) + (value_L_K_V * 0).sum((1, 2))
    for cache in (key_L_K_D, value_L_K_V):
        cache.nan_to_num_(0.0, 0.0, 0.0)
    return broken


def grouped_attention(
    query_B_K_Q_D: Tensor,
    key_B_K_L_D: Tensor,
    value_B_K_L_V: Tensor,
    visible: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks_K_Q: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in which all query heads of a group (and their positions) are one run of Q queries: [B, K, Q, V].

    `visible` is boolean, broadcastable to [B, K, Q, L]; None sees everything. `softcap` squashes scores as Gemma 2
    does (arXiv 2408.00118); `sinks_K_Q` are per-query logits that take probability mass and give no value, as in
    gpt-oss. Softmax is in float32. `dropout` is the probability to drop a weight, in training.
    """
    if softcap is None and sinks_K_Q is None and key_B_K_L_D.shape[-1] == value_B_K_L_V.shape[-1]:
        return F.scaled_dot_product_attention(
            query_B_K_Q_D, key_B_K_L_D, value_B_K_L_V, attn_mask=visible, scale=scaling, dropout_p=dropout
        )
    scores = torch.matmul(query_B_K_Q_D, key_B_K_L_D.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.dropout(_softmax(scores, sinks_K_Q).to(value_B_K_L_V.dtype), dropout)
    return torch.matmul(weights, value_B_K_L_V)


def _softmax(scores: Tensor, sinks_K_Q: Tensor | None) -> Tensor:
    if sinks_K_Q is None:
        return torch.softmax(scores, dim=-1)
    sinks = sinks_K_Q.float().unsqueeze(-1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]

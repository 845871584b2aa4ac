"""Attention of a packed row along its trie, with gradients: the second function in `AttentionInterface`.

Registers `penstock_training`; the row's attention reaches it as the keyword argument `segments` of `model(...)`.
Every segment attends to its ancestors and, causally, to itself. Owns the masks of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from penstock.kernels import reference
from penstock.kernels.paged import AttentionOptions
from penstock.models.gradients.packing import Segment

IMPLEMENTATION = "penstock_training"


class SegmentAttention:
    """The attention of one forward pass, and of its recomputation, over a packed row of T tokens."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._segments = segments
        self._device = device
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self, query_H_T_D: Tensor, key_K_T_D: Tensor, value_K_T_V: Tensor, options: AttentionOptions, dropout: float
    ) -> Tensor:
        """Attend for one layer: [T, H, V]. `dropout` is the probability to drop an attention weight."""
        outputs = [
            self._attend_segment(segment, query_H_T_D, key_K_T_D, value_K_T_V, options, dropout)
            for segment in self._segments
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1)

    def _attend_segment(
        self, segment: Segment, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, dropout: float
    ) -> Tensor:
        """[H, n, V] for the n tokens of the segment."""
        query = query[:, segment.begin : segment.end]
        spans = (*segment.ancestors, (segment.begin, segment.end))
        keys, values = (torch.cat([tensor[:, a:b] for a, b in spans], dim=1).unsqueeze(0) for tensor in (key, value))
        (heads, n, size), kv_heads = query.shape, keys.shape[1]
        if _is_causal(segment, options):
            return F.scaled_dot_product_attention(
                *(query[None], keys, values), is_causal=True, scale=options.scaling, dropout_p=dropout, enable_gqa=True
            )[0]
        group = heads // kv_heads
        sinks = None if options.sinks is None else options.sinks.view(kv_heads, group).repeat_interleave(n, dim=1)
        out = reference.grouped_attention(
            *(query.reshape(1, kv_heads, group * n, size), keys, values),
            self._visible(segment, options.window).repeat(group, 1),
            scaling=options.scaling,
            softcap=options.softcap,
            sinks_K_Q=sinks,
            dropout=dropout,
        )
        return out.view(heads, n, -1)

    def _visible(self, segment: Segment, window: int | None) -> Tensor:
        """Boolean [n, L]: which of the L tokens up to the segment's end each of its n tokens sees."""
        name = segment.begin, window
        if name not in self._masks:
            length = segment.position + segment.end - segment.begin
            query = torch.arange(segment.position, length, dtype=torch.int64, device=self._device)[:, None]
            context = torch.arange(length, dtype=torch.int64, device=self._device)[None, :]
            visible = context <= query
            if window is not None:
                visible &= context > query - window
            self._masks[name] = visible
        return self._masks[name]


def _is_causal(segment: Segment, options: AttentionOptions) -> bool:
    """Whether plain causal attention, which needs no mask, is all that the segment asks for."""
    length = segment.end - segment.begin
    is_plain = options.softcap is None and options.sinks is None
    return is_plain and not segment.ancestors and (options.window is None or length <= options.window)


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: SegmentAttention,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function transformers' attention modules call; tensors are [1, heads, T, head size]."""
    options = AttentionOptions(scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    return segments.attend(query[0], key[0], value[0], options, dropout).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, training_attention)

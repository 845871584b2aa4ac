"""Attention over the paged cache, entered through transformers' `AttentionInterface`.

Registers one function, `penstock`; the step's metadata reaches it as the keyword argument `paged` of `model(...)`.
Owns no weights and no memory. `PagedAttention` serves a step in plain torch; `ShapeProbe` only looks at what a model
stores and how it attends.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from penstock.kernels import reference
from penstock.models.layout import DecodeGroup, PrefillRow, StepLayout
from penstock.models.storage import KVStorage, LayerShape

IMPLEMENTATION = "penstock"


class Paged(Protocol):
    """What answers for the attention of one forward pass. Query is [H, T, D], key [K, T, D], value [K, T, V]."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """Attend for one layer: [T, H, V]."""
        ...


class Options:
    """How one layer attends: score scaling, window (tokens seen, itself included), soft cap, sink logits [H]."""

    __slots__ = ("scaling", "sinks", "softcap", "window")

    def __init__(self, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None) -> None:
        self.scaling = scaling
        self.window = window
        self.softcap = softcap
        self.sinks = sinks


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: Paged,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function transformers' attention modules call; tensors are [1, heads, T, head size]."""
    options = Options(scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    return paged.attend(module, query[0], key[0], value[0], options).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, attention_forward)


class PagedAttention:
    """One step's attention: writes K/V of all rows first, then every row reads its own context."""

    def __init__(self, storage: KVStorage, layout: StepLayout, layers: dict[int, int]) -> None:
        self._storage = storage
        self._layout = layout
        self._layers = layers

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """Attend for one layer: [T, H, V]."""
        keys, values = self._storage.layer(self._layers[id(module)])
        reference.write_kv(keys, values, self._layout.write_slots, key.transpose(0, 1), value.transpose(0, 1))
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        decodes, prefills = self._layout.groups(options.window)
        for group in decodes:
            out[group.tokens] = _decode(query, keys, values, group, options)
        for row in prefills:
            out[row.begin : row.end] = _prefill(query, keys, values, row, options)
        return out


def _decode(query_H_T_D: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, options: Options) -> Tensor:
    """One query per row, its heads grouped by the key/value head they share: [B, H, V]."""
    heads, kv_heads, rows = query_H_T_D.shape[0], keys.shape[1], group.tokens.shape[0]
    query = query_H_T_D.index_select(1, group.tokens).transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, -1)
    out = reference.grouped_attention(
        query,
        reference.gather_slots(keys, group.slots).transpose(1, 2),
        reference.gather_slots(values, group.slots).transpose(1, 2),
        group.visible,
        scaling=options.scaling,
        softcap=options.softcap,
        sinks_K_Q=None if options.sinks is None else options.sinks.view(kv_heads, -1),
    )
    return out.reshape(rows, heads, -1)


def _prefill(query_H_T_D: Tensor, keys: Tensor, values: Tensor, row: PrefillRow, options: Options) -> Tensor:
    """N queries of one row: [N, H, V]. Heads of a group and their positions form one run of queries."""
    heads, kv_heads, n = query_H_T_D.shape[0], keys.shape[1], row.end - row.begin
    group = heads // kv_heads
    query = query_H_T_D[:, row.begin : row.end].reshape(1, kv_heads, group * n, -1)
    key, value = (reference.gather_slots(cache, row.slots) for cache in (keys, values))
    broken = reference.mute_broken(key[row.common :], value[row.common :])
    sinks = None if options.sinks is None else options.sinks.view(kv_heads, group).repeat_interleave(n, dim=1)
    out = reference.grouped_attention(
        query,
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        row.visible.repeat(group, 1),
        scaling=options.scaling,
        softcap=options.softcap,
        sinks_K_Q=sinks,
    )
    seen = torch.where(row.visible[:, row.common :], broken, 0).sum(-1)
    return out.view(heads, n, -1).transpose(0, 1) + seen[:, None, None]


class ShapeProbe:
    """Records, in call order, which modules attend and what they would store; attends plainly and causally."""

    def __init__(self) -> None:
        self.layers: dict[int, int] = {}
        self.shapes: list[LayerShape] = []
        self.options: list[Options] = []

    @property
    def num_windows(self) -> int:
        """How many layers slide."""
        return sum(options.window is not None for options in self.options)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """Attend without a cache: [T, H, V]."""
        self.layers[id(module)] = len(self.shapes)
        self.options.append(options)
        self.shapes.append(LayerShape(key.shape[0], key.shape[-1], value.shape[-1], key.dtype))
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=options.scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)

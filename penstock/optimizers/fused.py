"""`FusedLayer`: a decoder layer as five calls of compiled kernels, in place of its original module.

Owns packed copies of the layer's weights. The residual stream is updated in place; norms run inside the product that
follows them, the residual sum inside the product before it. Called by the model's own loop over its layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penstock.kernels.native import Kernels
from penstock.kernels.paged import FusedAttention, Rotary
from penstock.kernels.products import ADD, GATED, STORE, Linear, Norm
from penstock.optimizers.behaviour import NormFacts
from penstock.optimizers.blocks import Block, Matrix


class Shape:
    """How a layer attends: its place among the caches, head counts and sizes, and the options its attention got."""

    def __init__(
        self, layer: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, *, scaling: float,
        window: int | None, softcap: float | None, sinks: Tensor | None, rotates: bool,
    ) -> None:  # fmt: skip
        self.layer = layer
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, key_dim, value_dim
        self.scaling, self.window, self.softcap, self.sinks = scaling, window, softcap, sinks
        self.rotates = rotates


class FusedLayer(nn.Module):
    """Runs `block` on the kernels: hidden states [1, T, N] in and out, other arguments as the model passes them."""

    def __init__(self, kernels: Kernels, block: Block, shape: Shape, quantize: bool) -> None:
        super().__init__()
        dtype = block.o.weight.dtype
        first, after_attention, second, after_mlp = (_norm(kernels, facts, dtype) for facts in block.norms)
        self._layer = shape.layer
        self._rotates = shape.rotates
        self._scale = block.scale
        self._after_attention, self._after_mlp = after_attention, after_mlp

        def linear(matrices: Any, **options: Any) -> Linear:
            weights, biases = [m.weight for m in matrices], [m.bias for m in matrices]
            return Linear(kernels, weights, biases, quantize=quantize, **options)

        def out(matrix: Matrix, after: Norm | None) -> Linear:
            return linear([matrix], mode=STORE if after else ADD, scale=block.scale)

        self._qkv = linear(block.qkv, norm=first)
        self._out = out(block.o, after_attention)
        self._attention = FusedAttention(
            shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim, dtype, scaling=shape.scaling,
            window=shape.window, softcap=shape.softcap, sinks=shape.sinks, rotary=_rotary(block, shape),
        )  # fmt: skip
        self._own_mlp, self._own_norm = block.own_mlp, second if block.own_mlp is not None else None
        if block.down is not None:
            mode = GATED if len(block.mlp) == 2 else STORE
            self._up = linear(block.mlp, norm=second, mode=mode, act=block.act)
            self._down = out(block.down, after_mlp)

    def forward(self, hidden_states: Tensor, *_: Any, paged: Any, position_embeddings: Any = None, **__: Any) -> Tensor:
        """The layer's output [1, T, N], in the memory of its input."""
        x = hidden_states[0]
        cos, sin = position_embeddings if self._rotates and position_embeddings is not None else (None, None)
        attended = self._attention(paged, self._layer, self._qkv(x), cos, sin)
        _add(x, self._out, attended, self._after_attention, self._scale)
        if self._own_mlp is None:
            _add(x, self._down, self._up(x), self._after_mlp, self._scale)
        else:
            self._add_own_mlp(x)
        return hidden_states

    def _add_own_mlp(self, x: Tensor) -> None:
        assert self._own_mlp is not None
        found = self._own_mlp((self._own_norm(x) if self._own_norm else x)[None])
        y = (found[0] if isinstance(found, tuple) else found).reshape(x.shape)
        if self._after_mlp is None:
            x.add_(y, alpha=self._scale)
        else:
            self._after_mlp.add_to(x, y.contiguous(), self._scale)

    @property
    def num_bytes(self) -> int:
        """Bytes of packed weights."""
        parts = [self._qkv, self._out] + ([] if self._own_mlp is not None else [self._up, self._down])
        return sum(part.num_bytes for part in parts)


def _add(x: Tensor, linear: Linear, y: Tensor, after: Norm | None, scale: float) -> None:
    """x += scale * after(linear(y))."""
    if after is None:
        linear(y, x)
    else:
        after.add_to(x, linear(y), scale)


def _norm(kernels: Kernels, facts: NormFacts | None, dtype: torch.dtype) -> Norm | None:
    if facts is None:
        return None
    return Norm(kernels, facts.kind, facts.weight, facts.bias, facts.eps, dtype)


def _rotary(block: Block, shape: Shape) -> Rotary:
    query, key = block.query_norm, block.key_norm
    if query is None or key is None:
        return Rotary(0, 0.0, None, None)
    whole = len(query.weight) != shape.key_dim
    return Rotary(2 if whole else 1, query.eps, query.weight, key.weight)

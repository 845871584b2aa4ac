"""`FusedLayer`: decoder layers as one call of compiled kernels, in place of the original modules.

Owns packed copies of the layers' weights. The residual stream is updated in place; norms run inside the product that
follows them, the residual sum inside the product before it. Called by the model's own loop over its layers; where
layers follow each other, the first runs them all and the others are `Joined`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from penstock.kernels.native import Kernels
from penstock.kernels.products import ADD, GATED, STORE, Linear, Norm
from penstock.kernels.program import STREAM, Attention, Program, Rotary
from penstock.optimizers.rewrites.layer_parts import Block, Matrix
from penstock.optimizers.rewrites.recognition import NormFacts

# Registers of a layer's program besides the stream.
_QKV, _ATTENDED, _INNER, _BEFORE_NORM = 1, 2, 3, 4


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
        builder = _Builder(kernels, block, quantize)
        builder.attend(shape)
        self._scale, self._own_mlp = block.scale, block.own_mlp
        if block.own_mlp is None:
            builder.mlp()
        else:
            self._own_norm, self._after_mlp = builder.norm(block.norms[2]), builder.norm(block.norms[3])
        self._program, self.num_bytes = builder.program, builder.num_bytes
        self.num_layers = 1

    def forward(self, hidden_states: Tensor, *_: Any, paged: Any, position_embeddings: Any = None, **__: Any) -> Tensor:
        """The output [1, T, N] of the last layer, in the memory of the input."""
        hidden_states = hidden_states.contiguous()
        cos, sin = position_embeddings if position_embeddings is not None else (None, None)
        self._program.run(hidden_states[0], paged, cos, sin)
        if self._own_mlp is not None:
            self._add_own_mlp(hidden_states[0])
        return hidden_states

    def join(self, other: FusedLayer) -> bool:
        """Run `other`, which comes next and gets the same arguments, in the same call; False if that cannot be."""
        if self._own_mlp is not None or other._own_mlp is not None:
            return False
        self._program.extend(other._program)
        self.num_layers += other.num_layers
        self.num_bytes += other.num_bytes
        return True

    def _add_own_mlp(self, x: Tensor) -> None:
        assert self._own_mlp is not None
        found = self._own_mlp((self._own_norm(x) if self._own_norm else x)[None])
        y = (found[0] if isinstance(found, tuple) else found).reshape(x.shape)
        if self._after_mlp is None:
            x.add_(y, alpha=self._scale)
        else:
            self._after_mlp.add_to(x, y.contiguous())


class Joined(nn.Module):
    """Where a layer was that an earlier one runs."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Nothing is left to do."""
        return hidden_states


class _Builder:
    """Writes the program of one layer."""

    def __init__(self, kernels: Kernels, block: Block, quantize: bool) -> None:
        self._kernels, self._block, self._quantize = kernels, block, quantize
        self._dtype = block.o.weight.dtype
        self.program = Program(kernels, self._dtype)
        self.num_bytes = 0

    def attend(self, shape: Shape) -> None:
        """x += scale * post(o(attention(qkv(pre(x)))))."""
        block = self._block
        attention = Attention(
            shape.layer, shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim, self._dtype,
            scaling=shape.scaling, window=shape.window, softcap=shape.softcap, sinks=shape.sinks,
            rotary=_rotary(block, shape),
        )  # fmt: skip
        self.program.linear(self._linear(block.qkv, norm=self.norm(block.norms[0])), STREAM, _QKV)
        self.program.attention(attention, _QKV, _ATTENDED)
        self._add(block.o, _ATTENDED, block.norms[1])

    def mlp(self) -> None:
        """x += scale * post(down(act(up(pre(x)))))."""
        block = self._block
        assert block.down is not None
        mode = GATED if len(block.mlp) == 2 else STORE
        up = self._linear(block.mlp, norm=self.norm(block.norms[2]), mode=mode, act=block.act)
        self.program.linear(up, STREAM, _INNER)
        self._add(block.down, _INNER, block.norms[3])

    def norm(self, facts: NormFacts | None) -> Norm | None:
        """A norm of the block, scaled as what it adds."""
        if facts is None:
            return None
        kind, weight, bias, eps = facts.kind, facts.weight, facts.bias, facts.eps
        return Norm(self._kernels, kind, weight, bias, eps, self._dtype, self._block.scale)

    def _add(self, matrix: Matrix, source: int, facts: NormFacts | None) -> None:
        """x += scale * norm(matrix(source))."""
        after = self.norm(facts)
        if after is None:
            self.program.linear(self._linear([matrix], mode=ADD, scale=self._block.scale), source, STREAM)
        else:
            self.program.linear(self._linear([matrix]), source, _BEFORE_NORM)
            self.program.add_norm(after, _BEFORE_NORM, STREAM)

    def _linear(self, matrices: Any, **options: Any) -> Linear:
        weights, biases = [m.weight for m in matrices], [m.bias for m in matrices]
        made = Linear(self._kernels, weights, biases, quantize=self._quantize, **options)
        self.num_bytes += made.num_bytes
        return made


def _rotary(block: Block, shape: Shape) -> Rotary:
    query, key = block.query_norm, block.key_norm
    if query is None or key is None:
        return Rotary(0, 0.0, None, None, rotates=shape.rotates)
    whole = len(query.weight) != shape.key_dim
    return Rotary(2 if whole else 1, query.eps, query.weight, key.weight, rotates=shape.rotates)

"""`FusedLayer`: decoder layers as one call of compiled kernels, in place of the original modules.

Owns packed copies of the layers' weights. The residual stream is updated in place; norms run inside the product that
follows them, the residual sum inside the product before it. Called by the model's own loop over its layers; of
consecutive layers the first runs them all and the others are `PassThroughLayer`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from penstock.kernels.native import Kernels
from penstock.kernels.paged import AttentionOptions
from penstock.kernels.products import ADD, GATED, STORE, STORE_ONLY, Epilogue, Linear, Norm
from penstock.kernels.program import STREAM, Attention, HeadGeometry, Paged, Program, Rotary
from penstock.optimizers.rewrites.layer_parts import LayerParts, LinearWeights
from penstock.optimizers.rewrites.packing import packed_linear, packed_norm
from penstock.optimizers.rewrites.recipes import PackedUnit, Recipe
from penstock.optimizers.rewrites.recognition import NormFacts

# Registers of a layer's program besides the stream.
_QKV, _ATTENDED, _INNER, _BEFORE_NORM = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """A layer's attention: its index among the caches, its heads, its options, and whether positions are rotary."""

    layer: int
    geometry: HeadGeometry
    options: AttentionOptions
    rotates: bool


class FusedLayer(nn.Module):
    """Runs the layer of `parts` on the kernels.

    Hidden states are [1, T, N] in and out; the other arguments are those that the model passes to its layers.
    """

    def __init__(self, kernels: Kernels, parts: LayerParts, shape: AttentionShape, quantize: bool) -> None:
        super().__init__()
        builder = _ProgramBuilder(kernels, parts, quantize)
        builder.attend(shape)
        self._scale, self._unfused_mlp = parts.scale, parts.unfused_mlp
        if parts.unfused_mlp is None:
            builder.mlp()
        else:
            self._mlp_norm, self._output_norm = builder.norm(parts.norms[2]), builder.norm(parts.norms[3])
        self._program, self.num_bytes, self.packed_units = builder.program, builder.num_bytes, builder.units
        self.num_layers = 1

    def forward(
        self,
        hidden_states: Tensor,
        *_: object,
        paged: Paged,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **__: object,
    ) -> Tensor:
        """The output [1, T, N] of the last layer, in the memory of the input."""
        hidden_states = hidden_states.contiguous()
        cos, sin = position_embeddings if position_embeddings is not None else (None, None)
        self._program.run(hidden_states[0], paged, cos, sin)
        if self._unfused_mlp is not None:
            self._add_unfused_mlp(hidden_states[0])
        return hidden_states

    def join(self, following: FusedLayer) -> bool:
        """Run `following`, the next layer with the same arguments, in the same call; False if that is impossible."""
        if self._unfused_mlp is not None or following._unfused_mlp is not None:
            return False
        self._program.extend(following._program)
        self.num_layers += following.num_layers
        self.num_bytes += following.num_bytes
        self.packed_units += following.packed_units
        return True

    def _add_unfused_mlp(self, x: Tensor) -> None:
        assert self._unfused_mlp is not None
        output = self._unfused_mlp((self._mlp_norm(x) if self._mlp_norm else x)[None])
        y = (output[0] if isinstance(output, tuple) else output).reshape(x.shape)
        if self._output_norm is None:
            x.add_(y, alpha=self._scale)
        else:
            self._output_norm.add_to(x, y.contiguous())


class PassThroughLayer(nn.Module):
    """Stands where a layer was that an earlier `FusedLayer` runs."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """The input."""
        return hidden_states


class _ProgramBuilder:
    """Writes the program of one layer."""

    def __init__(self, kernels: Kernels, parts: LayerParts, quantize: bool) -> None:
        self._kernels, self._parts, self._quantize = kernels, parts, quantize
        self._dtype = parts.o.weight.dtype
        self.program = Program(kernels, self._dtype)
        self.num_bytes = 0
        self.units: list[PackedUnit] = []

    def attend(self, shape: AttentionShape) -> None:
        """x += scale * post(o(attention(qkv(pre(x)))))."""
        parts, sinks = self._parts, shape.options.sinks
        rotary = self._rotary(shape)
        attention = Attention(shape.layer, shape.geometry, shape.options, rotary, self._dtype)
        if isinstance(sinks, nn.Parameter):
            self.units.append(PackedUnit([Recipe.of(sinks)], lambda tensors: attention.write(*tensors)))
        qkv = self._linear(parts.qkv, norm=self.norm(parts.norms[0]))
        self.program.linear(qkv, STREAM, _QKV)
        self.program.attention(attention, _QKV, _ATTENDED)
        self._add(parts.o, _ATTENDED, parts.norms[1])

    def mlp(self) -> None:
        """x += scale * post(down(act(up(pre(x)))))."""
        parts = self._parts
        assert parts.down is not None
        mode = GATED if len(parts.mlp) == 2 else STORE
        up = self._linear(parts.mlp, norm=self.norm(parts.norms[2]), epilogue=Epilogue(mode, parts.act))
        self.program.linear(up, STREAM, _INNER)
        self._add(parts.down, _INNER, parts.norms[3])

    def norm(self, facts: NormFacts | None) -> Norm | None:
        """A norm of the layer, with the layer's scale for what it adds."""
        if facts is None:
            return None
        norm, unit = packed_norm(self._kernels, facts, self._dtype, self._parts.scale)
        self.units.append(unit)
        return norm

    def _add(self, weights: LinearWeights, source: int, facts: NormFacts | None) -> None:
        """x += scale * norm(linear(source))."""
        norm = self.norm(facts)
        if norm is None:
            residual = Epilogue(ADD, scale=self._parts.scale)
            self.program.linear(self._linear([weights], epilogue=residual), source, STREAM)
        else:
            self.program.linear(self._linear([weights]), source, _BEFORE_NORM)
            self.program.add_norm(norm, _BEFORE_NORM, STREAM)

    def _linear(
        self, weights: Sequence[LinearWeights], *, norm: Norm | None = None, epilogue: Epilogue = STORE_ONLY
    ) -> Linear:
        linear, unit = packed_linear(self._kernels, weights, self._quantize, norm=norm, epilogue=epilogue)
        self.num_bytes += linear.num_bytes
        self.units.append(unit)
        return linear

    def _rotary(self, shape: AttentionShape) -> Rotary:
        query, key = self._parts.query_norm, self._parts.key_norm
        if query is None or key is None:
            return Rotary(0, 0.0, None, None, rotates=shape.rotates)
        spans_heads = len(query.weight) != shape.geometry.key_dim
        rotary = Rotary(2 if spans_heads else 1, query.eps, query.weight, key.weight, rotates=shape.rotates)
        recipes = [query.recipes[0], key.recipes[0]]
        self.units.append(PackedUnit(recipes, lambda tensors: rotary.write(*tensors)))
        return rotary

"""The pass `fused_layers`: decoder layers become `FusedLayer`s, each compared with its original before it replaces it.

During one trial pass of the model every layer is a `_TrialLayer`: it runs the original, builds a fused layer from the
same weights, runs that on the same input, and keeps it only if the outputs agree. Called by `passes`, once per load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from penstock.kernels.native import Kernels
from penstock.kernels.paged import AttentionOptions
from penstock.kernels.products import RMS
from penstock.kernels.program import HeadGeometry
from penstock.optimizers.rewrites.fused_layer import AttentionShape, FusedLayer, PassThroughLayer
from penstock.optimizers.rewrites.layer_parts import LayerParts, layer_parts_of

# Relative difference (Frobenius) up to which a fused layer counts as the same; a wrong structure is off by about 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
QUANTIZED_TOLERANCE = 0.15
FAR = 1 << 20  # tokens: beyond the positions at which some models begin to attend differently
LOOP_ATTRIBUTES = ("attention_type", "layer_type")  # read by some models' loop over their layers


class KVShape(Protocol):
    """What one layer stores per token: keys and values of `heads` heads."""

    @property
    def heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


class ProbedAttention(Protocol):
    """The model's attention modules in the order in which they run; `layers` has their index by id of the module."""

    @property
    def layers(self) -> Mapping[int, int]: ...
    @property
    def options(self) -> Sequence[AttentionOptions]: ...
    @property
    def shapes(self) -> Sequence[KVShape]: ...


def fuse_layers(
    module: nn.Module, probed: ProbedAttention, kernels: Kernels, quantize: bool, run: Callable[[], Tensor]
) -> tuple[int, int]:
    """Replace layers in place: (layers fused, layers in all). `run` makes one trial pass."""
    places = list(_layers(module, probed.layers))
    trials = [_TrialLayer(layer, kernels, probed, quantize) for _, _, layer in places]
    for (parent, index, _), trial in zip(places, trials, strict=True):
        parent[index] = trial
    try:
        run()
    finally:
        num_fused = sum(isinstance(trial.chosen, FusedLayer) for trial in trials)
        if trials:
            _join(trials)
        for (parent, index, _), trial in zip(places, trials, strict=True):
            parent[index] = trial.chosen
    _shorten(module, run)
    return num_fused, len(trials)


def _join(trials: Sequence[_TrialLayer]) -> None:
    """Merge consecutive layers into one call where each passes its output straight to the next, same positions."""
    head: nn.Module | None = None
    for previous, trial in zip([None, *trials], trials, strict=False):
        follows = previous is not None and trial.follows(previous)
        if (
            follows
            and isinstance(head, FusedLayer)
            and isinstance(trial.chosen, FusedLayer)
            and head.join(trial.chosen)
        ):
            trial.chosen = _with_loop_attributes(PassThroughLayer(), trial)
        else:
            head = trial.chosen


def _shorten(module: nn.Module, run: Callable[[], Tensor]) -> None:
    """Reduce lists whose first layer runs all others to that layer, if the model's logits stay the same.

    After a step every line of Python is cold: walking past 27 pass-through layers takes 0.2 ms.
    """
    for owner, name, layers in list(_merged_lists(module)):
        expected = run()
        setattr(owner, name, nn.ModuleList([layers[0]]))
        with suppress(Exception):
            if torch.equal(run(), expected):
                continue
        setattr(owner, name, layers)


def _merged_lists(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    for owner in module.modules():
        for name, layers in owner.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) > 1:
                _, *followers = layers
                if all(isinstance(layer, PassThroughLayer) for layer in followers):
                    yield owner, name, layers


def _layers(module: nn.Module, attention_ids: Mapping[int, int]) -> Iterator[tuple[nn.ModuleList, int, nn.Module]]:
    """(list, index, layer) of every entry of a module list that holds one attention module."""
    for parent in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for index, layer in enumerate(parent):
            if sum(id(part) in attention_ids for part in layer.modules()) == 1:
                yield parent, index, layer


class _TrialLayer(nn.Module):
    """Stands in for a layer during the trial pass; `chosen` takes its place afterwards."""

    def __init__(self, layer: nn.Module, kernels: Kernels, probed: ProbedAttention, quantize: bool) -> None:
        super().__init__()
        self.chosen = layer
        self._kernels, self._probed, self._quantize = kernels, probed, quantize
        self._input: Tensor | None = None
        self._output: object = None
        self._positions: object = None
        for name in LOOP_ATTRIBUTES:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        hidden_copy = hidden_states.clone()  # a layer may change its input
        output = self.chosen(hidden_states, *args, **kwargs)
        self._input, self._output, self._positions = hidden_states, output, kwargs.get("position_embeddings")
        if isinstance(output, Tensor):
            self._try_fused(hidden_copy, output, args, kwargs)
        return output

    def follows(self, previous: _TrialLayer) -> bool:
        """Whether its input was the very output of `previous`, with the same positions."""
        return self._input is previous._output is not None and self._positions is previous._positions

    def _try_fused(
        self, hidden_states: Tensor, expected: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        """Choose the first fused layer whose output agrees with `expected`."""
        parts = layer_parts_of(self.chosen)
        layer = None if parts is None else self._probed.layers.get(id(parts.attention))
        if parts is None or layer is None or hidden_states.dtype != parts.o.weight.dtype:
            return
        if not _is_consistent(parts, hidden_states.shape[-1]):
            return
        if self._depends_on_positions(hidden_states, expected, args, kwargs):
            return
        limit = QUANTIZED_TOLERANCE if self._quantize else TOLERANCE[hidden_states.dtype]
        for shape in _shapes(parts, self._probed, layer):
            try:
                fused = FusedLayer(self._kernels, parts, shape, self._quantize)
                output: Tensor = fused(hidden_states.clone(), *args, **kwargs)
            except MemoryError:
                raise
            except Exception:  # a shape that does not fit this layer
                continue
            if _distance(output - hidden_states, expected - hidden_states) <= limit:
                self.chosen = _with_loop_attributes(fused, self)
                return

    def _depends_on_positions(
        self, hidden_states: Tensor, expected: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> bool:
        """Whether positions do more than rotate: some models sharpen attention, but only far from the beginning."""
        position_ids = kwargs.get("position_ids")
        if not isinstance(position_ids, Tensor):
            return False
        with suppress(Exception):
            distant = {**kwargs, "position_ids": position_ids + FAR}
            return not torch.equal(self.chosen(hidden_states.clone(), *args, **distant), expected)
        return True


def _is_consistent(parts: LayerParts, width: int) -> bool:
    """Whether the sizes of the parts agree: kernels read as far as they are told."""
    down = [] if parts.down is None else [parts.down.weight]
    outer = [matrix.weight.shape[1] for matrix in (*parts.qkv, *parts.mlp)] + [len(w) for w in (parts.o.weight, *down)]
    outer += [len(norm.weight) for norm in parts.norms if norm is not None]
    inner = {len(matrix.weight) for matrix in parts.mlp} | {w.shape[1] for w in down}
    return set(outer) == {width} and len(inner) <= 1


def _shapes(parts: LayerParts, probed: ProbedAttention, layer: int) -> Iterator[AttentionShape]:
    """The ways this layer may attend: with and without rotary positions, scaled by the attention or before it."""
    stored, options = probed.shapes[layer], probed.options[layer]
    if options.sinks is not None and not isinstance(options.sinks, nn.Parameter):
        return  # nobody knows what they follow from
    rows = sum(len(matrix.weight) for matrix in parts.qkv)
    heads = (rows - stored.heads * (stored.key_dim + stored.value_dim)) // stored.key_dim
    if heads < stored.heads or heads % stored.heads or parts.o.weight.shape[1] != heads * stored.value_dim:
        return
    if not _norms_fit(parts, heads * stored.key_dim, stored.heads * stored.key_dim, stored.key_dim):
        return
    geometry = HeadGeometry(heads, stored.heads, stored.key_dim, stored.value_dim)
    for rotates in (True, False):
        for scaling in dict.fromkeys((options.scaling, stored.key_dim**-0.5)):
            scaled = AttentionOptions(scaling, options.window, options.softcap, options.sinks)
            yield AttentionShape(layer=layer, geometry=geometry, options=scaled, rotates=rotates)


def _norms_fit(parts: LayerParts, query_width: int, key_width: int, head_width: int) -> bool:
    """Whether the norms of queries and keys are RMSNorms, both of one head or both of all heads, or absent."""
    norms = [norm for norm in (parts.query_norm, parts.key_norm) if norm is not None]
    sizes = [len(norm.weight) for norm in norms]
    are_plain = all(norm.kind == RMS and norm.bias is None for norm in norms)
    return are_plain and sizes in ([], [head_width, head_width], [query_width, key_width])


def _with_loop_attributes(layer: nn.Module, trial: _TrialLayer) -> nn.Module:
    for name in LOOP_ATTRIBUTES:
        if hasattr(trial, name):
            setattr(layer, name, getattr(trial, name))
    return layer


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius distance; infinite when anything is not finite."""
    distance = ((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)).item()
    return distance if distance == distance else float("inf")

"""The pass `fused_layers`: decoder layers become `FusedLayer`s, each compared with its original before it takes over.

During one trial pass of the model every layer is a `_Trial`: it runs the original, builds a fused layer from the same
weights, runs that on the same input, and keeps it only if the outputs agree. Called by `rewriting`, once per load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from penstock.kernels.native import Kernels
from penstock.kernels.products import RMS
from penstock.optimizers.rewrites.fused_layer import FusedLayer, Joined, Shape
from penstock.optimizers.rewrites.layer_parts import Block, block_of

# Relative difference (Frobenius) up to which a fused layer counts as the same; a wrong structure is off by about 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
QUANTIZED_TOLERANCE = 0.15
FAR = 1 << 20  # tokens: farther than the positions at which models begin to treat attention differently


class Probed(Protocol):
    """What is known of the model's attention modules, in the order they run; `layers` by id of the module."""

    @property
    def layers(self) -> dict[int, int]: ...
    @property
    def options(self) -> Any: ...
    @property
    def shapes(self) -> Any: ...


def fuse_layers(
    module: nn.Module, probed: Probed, kernels: Kernels, quantize: bool, run: Callable[[], Tensor]
) -> tuple[int, int]:
    """Replace what can be replaced, in place: (layers fused, layers there are). `run` makes one trial pass."""
    places = list(_layers(module, probed.layers))
    trials = [_Trial(layer, kernels, probed, quantize) for _, _, layer in places]
    for (parent, index, _), trial in zip(places, trials, strict=True):
        parent[index] = trial
    try:
        run()
    finally:
        fused = sum(isinstance(trial.chosen, FusedLayer) for trial in trials)
        if trials:
            _join(trials)
        for (parent, index, _), trial in zip(places, trials, strict=True):
            parent[index] = trial.chosen
    _shorten(module, run)
    return fused, len(trials)


def _join(trials: Sequence[_Trial]) -> None:
    """Have each run of layers that pass the stream straight on, and get the same positions, run as one call."""
    first: nn.Module | None = None
    for before, trial in zip([None, *trials], trials, strict=False):
        straight = before is not None and trial.follows(before)
        if (
            straight
            and isinstance(first, FusedLayer)
            and isinstance(trial.chosen, FusedLayer)
            and first.join(trial.chosen)
        ):
            trial.chosen = _with_loop_attributes(Joined(), trial)
        else:
            first = trial.chosen


def _shorten(module: nn.Module, run: Callable[[], Tensor]) -> None:
    """Lists whose first layer runs all others hold it alone, where the model gives the same logits with them.

    After a step every line of Python is cold: walking past 27 joined layers takes 0.2 ms.
    """
    for owner, name, layers in list(_all_joined(module)):
        wanted = run()
        setattr(owner, name, nn.ModuleList([layers[0]]))
        with suppress(Exception):
            if torch.equal(run(), wanted):
                continue
        setattr(owner, name, layers)


def _all_joined(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    for owner in module.modules():
        for name, layers in owner.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) > 1:
                _, *others = layers
                if all(isinstance(layer, Joined) for layer in others):
                    yield owner, name, layers


def _layers(module: nn.Module, attending: Mapping[int, int]) -> Iterator[tuple[nn.ModuleList, int, nn.Module]]:
    """(list, index, layer) of every entry of a module list that holds one attention module."""
    for parent in [found for found in module.modules() if isinstance(found, nn.ModuleList)]:
        for index, layer in enumerate(parent):
            if sum(id(part) in attending for part in layer.modules()) == 1:
                yield parent, index, layer


class _Trial(nn.Module):
    """Stands in for a layer during the trial pass; `chosen` takes its place afterwards."""

    def __init__(self, layer: nn.Module, kernels: Kernels, probed: Probed, quantize: bool) -> None:
        super().__init__()
        self.chosen = layer
        self._make = (kernels, probed, quantize)
        self._seen: tuple[Any, Any, Any] = (None, None, None)
        for name in ("attention_type", "layer_type"):  # read by some models' loop over their layers
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = hidden_states.clone()
        wanted = self.chosen(hidden_states, *args, **kwargs)
        self._seen = (hidden_states, wanted, kwargs.get("position_embeddings"))
        if isinstance(wanted, Tensor):
            self._consider(before, wanted, args, kwargs)
        return wanted

    def follows(self, other: _Trial) -> bool:
        """Whether it was given the very output of `other`, and the same positions."""
        return self._seen[0] is other._seen[1] is not None and self._seen[2] is other._seen[2]

    def _consider(self, before: Tensor, wanted: Tensor, args: Any, kwargs: Any) -> None:
        kernels, probed, quantize = self._make
        block = block_of(self.chosen)
        layer = None if block is None else probed.layers.get(id(block.attention))
        if block is None or layer is None or before.dtype != block.o.weight.dtype:
            return
        if not _consistent(block, before.shape[-1]) or self._minds_positions(before, wanted, args, kwargs):
            return
        limit = QUANTIZED_TOLERANCE if quantize else TOLERANCE[before.dtype]
        for shape in _shapes(block, probed, layer):
            try:
                fused = FusedLayer(kernels, block, shape, quantize)
                found = fused(before.clone(), *args, **kwargs)
            except MemoryError:
                raise
            except Exception:  # a guess that does not fit this layer
                continue
            if _distance(found - before, wanted - before) <= limit:
                self.chosen = _with_loop_attributes(fused, self)
                return

    def _minds_positions(self, before: Tensor, wanted: Tensor, args: Any, kwargs: Any) -> bool:
        """Whether positions do more than rotate: some models sharpen attention, but only far from the beginning."""
        near = kwargs.get("position_ids")
        if not isinstance(near, Tensor):
            return False
        with suppress(Exception):
            return not torch.equal(self.chosen(before.clone(), *args, **{**kwargs, "position_ids": near + FAR}), wanted)
        return True


def _consistent(block: Block, width: int) -> bool:
    """Whether the parts belong together by their sizes: kernels read as far as they are told."""
    downs = [] if block.down is None else [block.down.weight]
    outer = [matrix.weight.shape[1] for matrix in (*block.qkv, *block.mlp)] + [len(w) for w in (block.o.weight, *downs)]
    outer += [len(norm.weight) for norm in block.norms if norm is not None]
    inner = {len(matrix.weight) for matrix in block.mlp} | {w.shape[1] for w in downs}
    return set(outer) == {width} and len(inner) <= 1


def _shapes(block: Block, probed: Probed, layer: int) -> Iterator[Shape]:
    """The ways this layer may attend: with and without rotary positions, scaled by the attention or before it."""
    stored, options = probed.shapes[layer], probed.options[layer]
    rows = sum(len(matrix.weight) for matrix in block.qkv)
    heads = (rows - stored.heads * (stored.key_dim + stored.value_dim)) // stored.key_dim
    if heads < stored.heads or heads % stored.heads or block.o.weight.shape[1] != heads * stored.value_dim:
        return
    if not _norms_fit(block, heads * stored.key_dim, stored.heads * stored.key_dim, stored.key_dim):
        return
    for rotates in (True, False):
        for scaling in dict.fromkeys((options.scaling, stored.key_dim**-0.5)):
            yield Shape(
                layer, heads, stored.heads, stored.key_dim, stored.value_dim, scaling=scaling, window=options.window,
                softcap=options.softcap, sinks=options.sinks, rotates=rotates,
            )  # fmt: skip


def _norms_fit(block: Block, query_width: int, key_width: int, head: int) -> bool:
    """Whether the norms of queries and keys are RMSNorms, both of one head or both of all heads, or there are none."""
    norms = [norm for norm in (block.query_norm, block.key_norm) if norm is not None]
    sizes = [len(norm.weight) for norm in norms]
    plain = all(norm.kind == RMS and norm.bias is None for norm in norms)
    return plain and sizes in ([], [head, head], [query_width, key_width])


def _with_loop_attributes(layer: nn.Module, trial: _Trial) -> nn.Module:
    for name in ("attention_type", "layer_type"):
        if hasattr(trial, name):
            setattr(layer, name, getattr(trial, name))
    return layer


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius distance; infinite when anything is not finite."""
    distance = ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-12)).item()
    return distance if distance == distance else float("inf")

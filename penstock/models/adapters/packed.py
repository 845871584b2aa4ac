"""`PackedAdapters`: the adapters of one model over the compiled kernels, packed for each product that they change.

Owns the packed copies, one slot per adapter, and hooks on linear layers that run outside of the kernels. Packing is
done where an adapter is read; taking it in only sets pointers. Never touches a weight of the model. Used by `Executor`
on the model's thread; `read` is for any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from penstock.errors import WeightsError
from penstock.kernels.low_rank import (
    AdapterSlots,
    LowRankPart,
    LowRankSum,
    NotFiniteError,
    PackedAdapter,
    pack_adapter,
)
from penstock.kernels.native import FLOATS, Kernels
from penstock.models.adapters.layers import check_fits, head_of, hooked_layers, layers_of, own_adapters_of, shape_of
from penstock.models.adapters.reading import Adapter, LoraLayer, not_finite, plain_name, read_adapter
from penstock.models.protocol import AdapterRead
from penstock.optimizers.rewrites.recipes import DerivedWeights, Placement
from penstock.step import Row


@dataclass(slots=True)
class _Hooked:
    """A layer outside of the kernels; `hook` once an adapter is loaded."""

    sum: LowRankSum
    hook: RemovableHandle | None = None


@dataclass(frozen=True, slots=True)
class _Layers:
    """The layers that adapters may change: placements in packed products, and all other modules, by their names."""

    placements: Mapping[str, Sequence[Placement]]
    modules: Mapping[str, nn.Module]
    head: set[str]


class PackedAdapters:
    """Adapters of `module` by their keys; `owner` is the live module that it is a view of, or itself."""

    def __init__(self, module: nn.Module, owner: nn.Module, weights: DerivedWeights, kernels: Kernels) -> None:
        self._module, self._owner, self._kernels = module, owner, kernels
        self._weights: DerivedWeights | None = weights
        self._layers: _Layers | None = None  # found when they are needed
        self._hooked: dict[str, _Hooked] = {}
        self._loaded: dict[str, tuple[int, PackedAdapter]] = {}
        self._spare: list[Tensor] = []  # memory of the adapter that was last unloaded

    def read(self, source: object, name: str) -> AdapterRead:
        """Pack an adapter. Loading it sets pointers, and hooks where no adapter has been. Any thread.

        Raises `WeightsError`.
        """
        if (problem := own_adapters_of(self._owner)) is not None:
            raise WeightsError(problem)
        layers = self._products(read_adapter(source, name))
        spare: Tensor | None = None
        with suppress(IndexError):  # another thread may have taken it
            spare = self._spare.pop()
        try:
            packed = pack_adapter(layers, spare)
        except NotFiniteError as error:
            raise not_finite(error.part.name) from None
        changed = {id(slots) for slots, _ in layers}
        hooked = [layer for layer in list(self._hooked.values()) if id(layer.sum.adapters) in changed]
        return AdapterRead(lambda key: self._load(key, packed), any(layer.hook is None for layer in hooked))

    def unload(self, key: str) -> None:
        """Drop an adapter that no later step uses; unknown keys are ignored."""
        if key not in self._loaded:
            return
        slot, packed = self._loaded.pop(key)
        packed.remove(slot)
        self._spare = [packed.memory]
        for hooked in list(self._hooked.values()):
            if hooked.hook is not None and not hooked.sum.adapters.is_used:
                hooked.hook.remove()
                hooked.hook = None

    def attach(self, module: nn.Module) -> None:
        """Apply the adapters to `module` from here on, in place of the last one. Raises `ConfigurationError`."""
        paths = [path for path, hooked in list(self._hooked.items()) if hooked.hook is not None]
        for path, part in hooked_layers(module, paths).items():
            hooked = self._hooked[path]
            if hooked.hook is not None:
                hooked.hook.remove()
            hooked.hook = part.register_forward_hook(_adding(hooked.sum))
        self._module, self._layers = module, None

    def close(self) -> None:
        """Let go of the model and of all adapters."""
        self._module = self._owner = nn.Module()
        self._weights = self._layers = None
        self._hooked, self._loaded, self._spare = {}, {}, []

    def select(self, rows: Sequence[Row], num_logits: Sequence[int]) -> None:
        """Apply to each token of the next pass, and to each row's number of logits, the adapter of its row."""
        if not any(row.adapter for row in rows):
            self._kernels.select_adapters(None)
            return
        slots = np.array([self._loaded[row.adapter][0] if row.adapter else -1 for row in rows], dtype=np.int32)
        logit_slots = np.repeat(slots, num_logits)
        none = np.full(1, -1, dtype=np.int32)  # the head is never without rows
        tokens = np.repeat(slots, [row.num_tokens for row in rows])
        self._kernels.select_adapters(tokens, logit_slots if len(logit_slots) else none)

    def _load(self, key: str, packed: PackedAdapter) -> None:
        """Take an adapter in, from the next step on."""
        used_slots = {slot for slot, _ in self._loaded.values()}
        slot = next(slot for slot in count() if slot not in used_slots)
        packed.put(slot)
        for path, hooked in list(self._hooked.items()):
            if hooked.hook is None and hooked.sum.adapters.is_used:
                part = self._found_layers().modules[path]
                hooked.hook = part.register_forward_hook(_adding(hooked.sum))
        self._loaded[key] = slot, packed

    def _products(self, adapter: Adapter) -> list[tuple[AdapterSlots, list[LowRankPart]]]:
        """The adapter's matrices by the products that they change. Raises `WeightsError` where one does not fit."""
        layers, products = self._found_layers(), dict[int, tuple[AdapterSlots, list[LowRankPart]]]()
        for path, matrices in adapter.layers.items():
            placements, part = layers.placements.get(path, ()), layers.modules.get(path)
            shape = shape_of(part) if not placements else placements[0].shape
            check_fits(path, matrices, shape)
            parts = [(placement.product.adapters, _part(path, matrices, placement)) for placement in placements]
            if not placements and part is not None:
                parts = [(self._hooked_layer(path, part).sum.adapters, _part(path, matrices))]
            for slots, low_rank in parts:
                products.setdefault(id(slots), (slots, []))[1].append(low_rank)
        return [(slots, sorted(parts, key=lambda part: part.first)) for slots, parts in products.values()]

    def _hooked_layer(self, path: str, part: nn.Module) -> _Hooked:
        if path not in self._hooked:
            n, k = reversed(shape_of(part) or (0, 0))
            dtypes = [parameter.dtype for parameter in part.parameters() if parameter.dtype in FLOATS]
            kernel = LowRankSum(self._kernels, n, k, dtypes[0] if dtypes else torch.float32)
            kernel.adapters.is_head = path in self._found_layers().head
            self._hooked.setdefault(path, _Hooked(kernel))
        return self._hooked[path]

    def _found_layers(self) -> _Layers:
        layers = self._layers  # another thread may drop them
        if layers is None:
            assert self._weights is not None, "the executor is closed"
            placements = self._weights.placements()
            by_path = {plain_name(name).removesuffix(".weight"): places for name, places in placements.items()}
            modules, head = layers_of(self._module), head_of(self._module)
            for path in [path for path in by_path if isinstance(modules.get(path), nn.Embedding)]:
                del by_path[path]  # its weight is the head's
            for placement in (placement for path in head for placement in by_path.get(path, ())):
                placement.product.adapters.is_head = True
            layers = self._layers = _Layers(by_path, modules, head)
        return layers


def _part(path: str, matrices: LoraLayer, placement: Placement | None = None) -> LowRankPart:
    """The part of an adapter that changes one matrix of a product, or a layer of its own."""
    b = matrices.b if placement is None else placement.outputs_of(matrices.b)
    return LowRankPart(path, _rows(matrices.a), _rows(b), matrices.scaling, 0 if placement is None else placement.first)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix on the CPU, with contiguous rows."""
    matrix = matrix.cpu()
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _adding(kernel: LowRankSum) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds to the output of a layer, which nothing else has yet, what the adapters add."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        y = output.to(kernel.dtype).contiguous()
        kernel.add(inputs[0].to(kernel.dtype).contiguous(), y)
        return y.to(output.dtype)

    return add

"""`TorchAdapters`: the adapters of one model in plain torch, for any device; `PackedAdapters` are those of the kernels.

Owns copies of the adapters' matrices, those of a layer below each other, and a hook on each linear layer that any of
them changes. Never touches a weight of the model. Used by `Executor` on the model's thread; `read` is for any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from penstock.errors import WeightsError
from penstock.models.adapters.layers import check_fits, head_of, hooked_layers, layers_of, own_adapters_of, shape_of
from penstock.models.adapters.reading import Adapter, LoraLayer, not_finite, read_adapter
from penstock.models.protocol import AdapterRead
from penstock.step import Row

# The least number of rows of a layer's matrices: growing copies them, for which the next step has to wait.
MIN_ROWS = 256


@dataclass(slots=True)
class _Layer:
    """a [C, K] and b [C, N], float32: the matrices of all adapters, b transposed; zero where an adapter has none.

    Rows that no adapter has had yet are uninitialized, and take no memory on a CPU.
    """

    a: Tensor
    b: Tensor
    hook: RemovableHandle


@dataclass(frozen=True, slots=True)
class _Selection:
    """Columns [begin, end) belong to the adapters of a step; `outside` bool [T, end - begin]: not to this token's.

    `outside_head` bool [L, end - begin] is the same for the rows of the output head.
    """

    begin: int
    end: int
    outside: Tensor
    outside_head: Tensor


class TorchAdapters:
    """Adapters of `module` by their keys. Each has a range of columns, the same in every layer."""

    def __init__(self, module: nn.Module, owner: nn.Module, device: torch.device) -> None:
        self._module, self._owner = module, owner
        self._device = device
        self._columns: dict[str, range] = {}
        self._layers: dict[str, _Layer] = {}
        self._capacity = 0
        self._num_initialized = 0  # of the rows of every layer
        self._selection: _Selection | None = None

    def read(self, source: object, name: str) -> AdapterRead:
        """`read_adapter`; loading it may need more memory. Any thread. Raises `WeightsError`."""
        adapter = read_adapter(source, name)
        for path, layer in adapter.layers.items():
            bounds = *layer.a.aminmax(), *(bound.float() * layer.scaling for bound in layer.b.aminmax())
            if not all(bool(bound.isfinite()) for bound in bounds):  # masking would not keep them from other rows
                raise not_finite(path)
        return AdapterRead(lambda key: self.load(key, adapter), may_fail=True)

    def load(self, key: str, adapter: Adapter) -> None:
        """Take an adapter in, from the next step on. Raises `WeightsError`, and then nothing has changed."""
        modules = self._fitting_modules(adapter)
        columns = self._reserve(adapter.rank)
        with torch.inference_mode():
            self._initialize(columns, adapter)
            for path, matrices in adapter.layers.items():
                layer = self._layers.get(path) or self._new_layer(path, modules[path], matrices)
                part = slice(columns.start, columns.start + len(matrices.a))
                layer.a[part], layer.b[part] = matrices.a, matrices.b.T.float() * matrices.scaling
        self._columns[key] = columns

    def unload(self, key: str) -> None:
        """Drop an adapter that no later step uses; unknown keys are ignored."""
        columns = self._columns.pop(key, None)
        if columns is None:
            return
        if not self._columns:
            self._clear()

    def attach(self, module: nn.Module) -> None:
        """Apply the adapters to `module` from here on, in place of the last one. Raises `ConfigurationError`."""
        parts = hooked_layers(module, self._layers.keys())
        self._module = module
        for path, part in parts.items():
            self._layers[path].hook.remove()
            self._layers[path].hook = self._hook(path, part)

    def close(self) -> None:
        """Let go of the model and of all adapters."""
        self._module = self._owner = nn.Module()
        self._columns = {}
        self._clear()

    def select(self, rows: Sequence[Row], num_logits: Sequence[int]) -> None:
        """Apply to each token of the next pass, and to each row's number of logits, the adapter of its row."""
        self._selection = None
        if not any(row.adapter for row in rows):
            return
        adapters = [self._columns[row.adapter] if row.adapter else None for row in rows]
        used = [columns for columns in adapters if columns is not None]
        begin, end = min(columns.start for columns in used), max(columns.stop for columns in used)
        counts = [row.num_tokens for row in rows], num_logits
        masks = (_outside(begin, end, adapters, count).to(self._device, non_blocking=True) for count in counts)
        self._selection = _Selection(begin, end, *masks)

    def _fitting_modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        """The linear layers of the adapter. Raises `WeightsError` where one does not fit."""
        if (problem := own_adapters_of(self._owner)) is not None:
            raise WeightsError(problem)
        modules = layers_of(self._module)
        for path, matrices in adapter.layers.items():
            check_fits(path, matrices, shape_of(modules.get(path)))
        return modules

    def _reserve(self, rank: int) -> range:
        """The first free columns; more of them where there are not enough."""
        begin = 0
        for columns in sorted(self._columns.values(), key=lambda columns: columns.start):
            if columns.start - begin >= rank:
                break
            begin = columns.stop
        if begin + rank > self._capacity:
            self._grow(max(2 * self._capacity, begin + rank, MIN_ROWS if self._device.type == "cpu" else 0))
        return range(begin, begin + rank)

    def _grow(self, capacity: int) -> None:
        size = self._num_initialized
        for layer in self._layers.values():
            for name, matrix in (("a", layer.a), ("b", layer.b)):
                larger = matrix.new_empty(capacity, matrix.shape[1])
                larger[:size] = matrix[:size]
                setattr(layer, name, larger)
        self._capacity = capacity

    def _initialize(self, columns: range, adapter: Adapter) -> None:
        """Zero the rows of an adapter in all layers, as far as its matrices will not be there."""
        for path, layer in self._layers.items():
            rank = len(adapter.layers[path].a) if path in adapter.layers else 0
            for matrix in (layer.a, layer.b):
                matrix[columns.start + rank : columns.stop] = 0
        self._num_initialized = max(self._num_initialized, columns.stop)

    def _new_layer(self, path: str, module: nn.Module, matrices: LoraLayer) -> _Layer:
        sizes = matrices.a.shape[1], len(matrices.b)
        a, b = (torch.empty(self._capacity, size, dtype=torch.float32, device=self._device) for size in sizes)
        a[: self._num_initialized] = b[: self._num_initialized] = 0
        layer = self._layers[path] = _Layer(a, b, self._hook(path, module))
        return layer

    def _clear(self) -> None:
        for layer in self._layers.values():
            layer.hook.remove()
        self._layers, self._capacity, self._num_initialized = {}, 0, 0

    def _hook(self, path: str, module: nn.Module) -> RemovableHandle:
        is_head = path in head_of(self._module)

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            selection = self._selection
            if selection is None:
                return None
            outside = selection.outside_head if is_head else selection.outside
            return _sum(inputs[0], output, self._layers[path], selection, outside)

        return module.register_forward_hook(add)


def _outside(begin: int, end: int, adapters: Sequence[range | None], counts: Sequence[int]) -> Tensor:
    """Bool [sum of counts, end - begin]: which columns do not belong to the adapter of a row; at least one row."""
    outside = torch.ones(max(1, sum(counts)), end - begin, dtype=torch.bool, device="cpu")
    first = 0
    for columns, count in zip(adapters, counts, strict=True):
        if columns is not None:
            outside[first : first + count, columns.start - begin : columns.stop - begin] = False
        first += count
    return outside


def _sum(x: Tensor, y: Tensor, layer: _Layer, selection: _Selection, outside: Tensor) -> Tensor:
    """y [..., N], of which x [..., K] are the inputs, and what each token's adapter adds to it; summed in float32."""
    part = slice(selection.begin, selection.end)
    inner = x.reshape(-1, x.shape[-1]).float() @ layer.a[part].T
    inner.masked_fill_(outside, 0.0)
    return torch.addmm(y.reshape(-1, y.shape[-1]).float(), inner, layer.b[part]).to(y.dtype).view(y.shape)

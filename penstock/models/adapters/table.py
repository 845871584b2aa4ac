"""`AdapterTable`: the adapters of one model, applied to the rows of a step beside the model's own products.

Owns copies of the adapters' matrices, those of a layer below each other, and a hook on each linear layer that any of
them changes. Never touches a weight of the model. Used by `Executor` on the model's thread; `read` is for any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from penstock.errors import ConfigurationError, WeightsError
from penstock.models.adapters.reading import Adapter, LowRank, plain_name, read_adapter
from penstock.models.watch import is_adapter_layer
from penstock.optimizers.rewrites.fused_layer import FusedLayer
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
    """Columns [begin, end) belong to the adapters of a step; `outside` bool [T, end - begin]: not to this token's."""

    begin: int
    end: int
    outside: Tensor


class AdapterTable:
    """Adapters of `module` by their keys. Each has a range of columns, the same in every layer."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._columns: dict[str, range] = {}
        self._layers: dict[str, _Layer] = {}
        self._capacity = 0
        self._num_initialized = 0  # of the rows of every layer
        self._selection: _Selection | None = None

    def read(self, source: object, name: str) -> Callable[[str], None]:
        """`read_adapter`; the function that loads the adapter under a key. Any thread. Raises `WeightsError`."""
        adapter = read_adapter(source, name)
        return lambda key: self.load(key, adapter)

    def load(self, key: str, adapter: Adapter) -> None:
        """Take an adapter in, from the next step on. Raises `WeightsError`, and then nothing has changed."""
        modules = self._fitting_modules(adapter)
        columns = self._reserve(adapter.rank)
        with torch.inference_mode():
            self._initialize(columns, adapter)
            for path, matrices in adapter.layers.items():
                layer = self._layers.get(path) or self._new_layer(path, modules[path], matrices)
                part = slice(columns.start, columns.start + len(matrices.a))
                layer.a[part], layer.b[part] = matrices.a, matrices.b.T
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
        if self._columns:
            try:
                modules = _modules_of(module)
            except WeightsError as error:
                raise ConfigurationError(str(error)) from error
            for path, layer in self._layers.items():
                layer.hook.remove()
                layer.hook = self._hook(path, modules[path])
        self._module = module

    def select(self, rows: Iterable[Row]) -> None:
        """Apply to each token of the next pass the adapter of its row."""
        self._selection = None
        if not self._columns:
            return
        counts = [(self._columns.get(row.adapter), row.num_tokens) for row in rows]
        used = [columns for columns, _ in counts if columns is not None]
        if not used:
            return
        begin, end = min(columns.start for columns in used), max(columns.stop for columns in used)
        shape = sum(count for _, count in counts), end - begin
        outside = torch.ones(shape, dtype=torch.bool, device="cpu")
        first = 0
        for columns, count in counts:
            if columns is not None:
                outside[first : first + count, columns.start - begin : columns.stop - begin] = False
            first += count
        self._selection = _Selection(begin, end, outside.to(self._device, non_blocking=True))

    def _fitting_modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        """The linear layers of the adapter. Raises `WeightsError` where one does not fit."""
        modules = _modules_of(self._module)
        head = self._module.get_output_embeddings()  # type: ignore[operator]
        for path, matrices in adapter.layers.items():
            module = modules.get(path)
            shape = None if module is None else _features(module)
            if shape is None:
                raise WeightsError(f"the model has no linear layer {path}, and the adapter changes it")
            if module is head:
                raise WeightsError(f"the adapter changes {path}, and adapters of the output head are not supported")
            if (given := (matrices.a.shape[1], len(matrices.b))) != shape:
                raise WeightsError(
                    f"{path} maps {shape[0]} numbers to {shape[1]}; in the adapter, {given[0]} to {given[1]}"
                )
        return modules

    def _reserve(self, rank: int) -> range:
        """The first free columns; more of them where there are not enough."""
        begin = 0
        for taken in sorted(self._columns.values(), key=lambda columns: columns.start):
            if taken.start - begin >= rank:
                break
            begin = taken.stop
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

    def _new_layer(self, path: str, module: nn.Module, matrices: LowRank) -> _Layer:
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
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            selection = self._selection
            return None if selection is None else _sum(inputs[0], output, self._layers[path], selection)

        return module.register_forward_hook(add)


def _sum(x: Tensor, y: Tensor, layer: _Layer, selection: _Selection) -> Tensor:
    """y [..., N], of which x [..., K] are the inputs, and what each token's adapter adds to it; summed in float32."""
    part = slice(selection.begin, selection.end)
    inner = x.reshape(-1, x.shape[-1]).float() @ layer.a[part].T
    inner.masked_fill_(selection.outside, 0.0)
    return torch.addmm(y.reshape(-1, y.shape[-1]).float(), inner, layer.b[part]).to(y.dtype).view(y.shape)


def _modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """All parts of a model by the names that they have in the base model. Raises `WeightsError`."""
    modules = {plain_name(path): part for path, part in module.named_modules()}
    if any(isinstance(part, FusedLayer) for part in modules.values()):
        raise WeightsError(
            "adapters cannot be applied inside of fused layers: make the engine with weight_mode='shared', or with "
            "disabled_rewrites=['fused_layers']"
        )
    for path, part in modules.items():
        if is_adapter_layer(part) and (part.merged_adapters or not part._disable_adapters):
            raise WeightsError(
                f"the borrowed module applies an adapter of its own to every request ({path}): lend the engine the "
                "base model, or call disable_adapter_layers() on it"
            )
    return modules


def _features(module: nn.Module) -> tuple[int, int] | None:
    """The numbers of inputs and outputs of a linear layer; None for anything else."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(module, name, None) for name in names]
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    return None

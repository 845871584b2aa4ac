"""How what kernels hold follows from a model's parameters, and how it is written again: `Recipe`, `DerivedWeights`.

A packed unit (the packed matrices of a product, a norm, sinks) keeps a recipe for each tensor that it was made from:
the parameter, and what is done to it. Nothing here keeps a parameter alive. Filled in by the passes, called by the
executor between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError
from penstock.kernels.native import FLOATS
from penstock.kernels.products import Linear

Transform = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    """The parameter itself."""
    return x


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tensor is `transform(parameter)`; the parameter is known by its `id`, so that it can be let go."""

    parameter_id: int
    transform: Transform = unchanged

    @classmethod
    def of(cls, parameter: nn.Parameter, transform: Transform = unchanged) -> Recipe:
        """What `transform` makes of this parameter."""
        return cls(id(parameter), transform)

    def tensor(self, values: Mapping[int, Tensor]) -> Tensor | None:
        """What follows from the parameter's new value; None where it has none."""
        value = values.get(self.parameter_id)
        return None if value is None else self.transform(value.detach())

    def then(self, transform: Transform) -> Recipe:
        """What `transform` makes of this recipe's tensor."""
        first = self.transform
        return Recipe(self.parameter_id, lambda x: transform(first(x)))


@dataclass(frozen=True, slots=True)
class PackedUnit:
    """What one object of the kernels was made from: `write` takes a tensor, or None to keep it, for each recipe.

    `product` is the one with the packed matrices, if there are any; their recipes come first, in its order.
    """

    recipes: Sequence[Recipe | None]
    write: Callable[[Sequence[Tensor | None]], None]
    product: Linear | None = None

    def refresh(self, values: Mapping[int, Tensor]) -> bool:
        """Write what follows from these parameters, by id; whether there was anything."""
        tensors = [None if recipe is None else recipe.tensor(values) for recipe in self.recipes]
        if all(tensor is None for tensor in tensors):
            return False
        self.write(tensors)
        return True


@dataclass(frozen=True, slots=True)
class Placement:
    """Outputs of `product` from `first` on are what the recipe makes of a matrix parameter of `parameter_shape`."""

    product: Linear
    first: int
    recipe: Recipe
    parameter_shape: torch.Size

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of inputs and outputs of the layer with that matrix."""
        k = self.product.k
        return k, self.parameter_shape.numel() // k

    def outputs_of(self, b: Tensor) -> Tensor:
        """The rows of b [outputs of the layer, R] for these outputs of the product."""
        if self.recipe.transform is unchanged:
            return b
        # Recipes choose rows of weights [N, K], or transpose GPT-2's [K, N] first, which shows in the strides.
        weight = torch.empty(self.parameter_shape, dtype=b.dtype, device="meta")
        is_transposed = self.recipe.transform(weight).stride(-1) != 1
        return self.recipe.transform(b.T if is_transposed else b)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A parameter of the model as it was before the rewrites; several names if it is tied."""

    names: list[str]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class DerivedWeights:
    """The weights of `module`, by the names of the parameters that it has when this is made, before the rewrites.

    `shares` says that parameters which no pass replaces are the source's own. Raises `ConfigurationError`.
    """

    def __init__(self, module: nn.Module, *, shares: bool) -> None:
        self._module, self._shares = module, shares
        self._entries: dict[int, _Entry] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._entries.setdefault(
                id(parameter), _Entry([], parameter.shape, parameter.dtype, parameter.device)
            ).names.append(name)
        self._ids = {name: key for key, entry in self._entries.items() for name in entry.names}
        self._places: list[tuple[nn.Module, str, int]] = []
        self._units: list[PackedUnit] = []

    def follow(self) -> None:
        """Take note of the rewritten module: its packed units, and the parameters that are left."""
        parts = list(self._module.modules())
        self._units = [unit for part in parts for unit in vars(part).get("packed_units", ())]
        self._places = [
            (part, leaf, id(parameter))
            for part in parts
            for leaf, parameter in part._parameters.items()
            if parameter is not None and id(parameter) in self._entries
        ]

    def refresh(self, source: Mapping[str, Tensor], names: Collection[str] | None = None) -> int:
        """Write all that follows from the parameters `names` of `source`, in place, one unit at a time; how many units.

        None: from all that the model has, too. Raises `ConfigurationError` before anything is written.
        """
        values = self._checked(source, source.keys() & self._ids.keys() if names is None else names)
        for part, leaf, key in self._places:
            if key in values:
                self._place(part, leaf, values[key])
        return sum(unit.refresh(values) for unit in self._units)

    def check(self, source: Mapping[str, Tensor]) -> None:
        """Raise `ConfigurationError` where `refresh` would."""
        self._checked(source, source.keys() & self._ids.keys())

    def places(self) -> dict[str, Tensor]:
        """A tensor on the meta device for every name, in the shape and dtype of the parameter; one for tied names."""
        places = {
            key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in self._entries.items()
        }
        return {name: places[key] for name, key in self._ids.items()}

    def device_of(self, name: str) -> torch.device:
        """Where the parameter of this name was when the model was loaded."""
        return self._entries[self._ids[name]].device

    def distinct(self, names: Collection[str] | None = None) -> set[str]:
        """One name for each parameter of these (None: of all); names of anything else are left out."""
        keys = self._entries.keys() if names is None else {self._ids[name] for name in names if name in self._ids}
        return {self._entries[key].names[0] for key in keys}

    def remaining(self) -> list[Tensor]:
        """The parameters that no pass has replaced."""
        return [part._parameters[leaf] for part, leaf, _ in self._places]  # type: ignore[misc]  # none is None

    def packed_memory(self) -> list[Tensor]:
        """The memory of all packed matrices."""
        return [unit.product.memory for unit in self._units if unit.product is not None]

    def placements(self) -> dict[str, list[Placement]]:
        """Where matrices are in packed products, by names; those that are in several of them are left out."""
        placements: dict[int, list[Placement]] = {}
        for unit in self._units:
            product = unit.product
            for first, recipe in zip([] if product is None else product.firsts(), unit.recipes, strict=False):
                assert product is not None
                assert recipe is not None
                shape = self._entries[recipe.parameter_id].shape
                placements.setdefault(recipe.parameter_id, []).append(Placement(product, first, recipe, shape))
        single = {key: places for key, places in placements.items() if len({id(x.product) for x in places}) == 1}
        return {name: places for key, places in single.items() for name in self._entries[key].names}

    def _place(self, part: nn.Module, leaf: str, value: Tensor) -> None:
        current = part._parameters[leaf]
        assert current is not None
        if self._shares and isinstance(value, nn.Parameter):
            part._parameters[leaf] = value
        elif current.dtype != value.dtype or not torch.equal(current, value):  # pages of files stay unwritten
            current.copy_(value)

    def _checked(self, source: Mapping[str, Tensor], names: Collection[str]) -> dict[int, Tensor]:
        """The new values by the ids of their parameters."""
        values: dict[int, Tensor] = {}
        for name in names:
            key, value = self._ids.get(name), source.get(name)
            if key is None or value is None:
                raise ConfigurationError(f"{name!r} is not a parameter of the model: its names are {_some(self._ids)}")
            entry = self._entries[key]
            actual, expected = (tuple(value.shape), value.device), (tuple(entry.shape), entry.device)
            if actual != expected or value.dtype not in FLOATS:
                raise ConfigurationError(
                    f"{name} is {value.dtype} {actual[0]} on {actual[1]} and was {expected[0]} on {expected[1]} when "
                    "the model was loaded: a floating dtype of up to 32 bits is needed, in the same shape and place"
                )
            values[key] = value
        return values


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")

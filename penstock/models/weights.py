"""`ModelWeights`: the weights of a loaded model and how new values reach everything that is derived from them.

Of a borrowed module the owner's tensors are written; of a model that the engine loaded, what is left of its parameters
and what the kernels packed. Called by `Executor` on the model's thread, between steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from penstock.api.weights import WeightSource
from penstock.errors import ConfigurationError, ExecutionError, WeightsError
from penstock.models.borrow import Borrowed
from penstock.models.storage import release_rows
from penstock.models.updates import copy_into, named_weights, read_source, write
from penstock.models.wrappers import name_before_compiling, parameters_by_name, unwrapped_name
from penstock.optimizers.rewrites.recipes import DerivedWeights


class ModelWeights:
    """The weights of `module`, a view of what is `borrowed` if anything is; with `is_packed`, kernels have copies."""

    def __init__(
        self, module: nn.Module, derived: DerivedWeights, borrowed: Borrowed | None, *, is_packed: bool
    ) -> None:
        self._module: nn.Module | None = module
        self._derivations: DerivedWeights | None = derived
        self._borrowed = borrowed
        self._is_packed = is_packed

    def refresh(self, names: Collection[str] | None = None, source: Mapping[str, Tensor] | None = None) -> int:
        """Have everything follow the parameters `names` (None: all) of the borrowed module as they are now.

        For a model that the engine loaded, `source` has the new values, of any floating dtype; None changes nothing.
        Allocates less than the largest packed unit. Returns how many packed units were written. Raises
        `ConfigurationError` before anything is written, `ExecutionError` for a module that was changed otherwise.
        """
        if self._borrowed is not None:
            assert source is None, "a borrowed module is its own source"
            source = self._borrowed.parameters() if self._is_packed else None
        elif source is not None and names is None:
            names = source.keys()  # each must have a place
        if source is None:
            return 0
        if names is not None:
            names = [name if name in source else unwrapped_name(name) for name in names]
        with torch.inference_mode():
            return self._derived.refresh(source, names)

    def read(self, source: WeightSource) -> WeightSource:
        """Check the weights of a source, without writing any; what to pass to `update`. Raises `WeightsError`."""
        if self._borrowed is None and source is None:
            raise WeightsError("this engine loaded its model itself, so nobody else changes its weights: pass a source")
        try:
            if self._borrowed is not None and self._is_packed:
                self._derived.check(self._borrowed.parameters())
        except (ConfigurationError, ExecutionError) as error:
            raise WeightsError(str(error)) from error
        return read_source(self._places(), source)

    def update(self, source: WeightSource) -> None:
        """Write weights that were read, or take over what the owner wrote (None). Raises `WeightsError`."""
        if self._borrowed is None:
            write(self._places(), source, self._put)  # type: ignore[arg-type]  # no folder: it was read
        elif source is None:
            self.follow_owner()
        else:
            names = write(self._places(), source, copy_into)  # type: ignore[arg-type]
            self.follow_owner(names & parameters_by_name(self._borrowed.owner).keys())

    def follow_owner(self, names: Collection[str] | None = None) -> None:
        """Bring what is derived from these weights (None: from any) of the owner up to date. Raises `WeightsError`."""
        try:
            self.refresh(names)
        except (ConfigurationError, ExecutionError) as error:
            # What no pass packed is the owner's own and new already, while the copies are old.
            raise WeightsError(f"{error}; close the engine: old and new weights are mixed", is_mixed=True) from error

    def release(self) -> None:
        """Free the memory of packed copies until `follow_owner`. Raises `WeightsError`."""
        if not self._is_packed:
            return
        if self._borrowed is None:
            raise WeightsError(
                "this engine loaded its weights and keeps them in packed form only, so they could not be made again: "
                "sleep with level='cache', or lend the engine a live module"
            )
        for memory in self._derived.packed_memory():
            release_rows(memory, 0, len(memory))

    def close(self) -> None:
        """Let go of all weights."""
        self._module = self._borrowed = self._derivations = None

    @property
    def _derived(self) -> DerivedWeights:
        assert self._derivations is not None, "the executor is closed"
        return self._derivations

    def _places(self) -> dict[str, Tensor]:
        """What a source is compared with, by name; parameters of a model that the engine loaded have no values."""
        if self._borrowed is not None:
            named = named_weights(self._borrowed.owner).items()
            return {name_before_compiling(name): value for name, value in named}
        assert self._module is not None, "the executor is closed"
        remaining = named_weights(self._module).items()
        buffers = {name: value for name, value in remaining if not isinstance(value, nn.Parameter)}
        return {**self._derived.places(), **buffers}

    def _put(self, name: str, place: Tensor, value: Tensor) -> None:
        """Write one weight of a model that the engine loaded."""
        if place.is_meta:
            device = self._derived.device_of(name)
            self.refresh([name], {name: value.detach().to(device, place.dtype)})
        else:
            copy_into(name, place, value)

"""`ModelWeights`: the weights of a loaded model and how new values reach everything that is derived from them.

Of a borrowed module the owner's tensors are written; of a model that the engine loaded, what is left of its parameters
and what the kernels packed. Called by `Executor` on the model's thread, between steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from penstock.api.weights import SleepLevel, WeightSource
from penstock.errors import ConfigurationError, ExecutionError, WeightsError
from penstock.models.borrow import Borrowed
from penstock.models.completeness import listed
from penstock.models.origin import Origin, reading
from penstock.models.storage import release_memory, restore_memory
from penstock.models.updates import FolderWeights, copy_into, named_weights, read_source, write
from penstock.models.wrappers import name_before_compiling, parameters_by_name, unwrapped_name
from penstock.optimizers.rewrites.recipes import DerivedWeights


class ModelWeights:
    """The weights of `module`, a view of what is `borrowed`, or read from `origin`: one of these is None.

    With `is_packed`, kernels have copies.
    """

    def __init__(
        self, module: nn.Module, derived: DerivedWeights, borrowed: Borrowed | None, origin: Origin | None, *,
        is_packed: bool,
    ) -> None:  # fmt: skip
        self._module: nn.Module | None = module
        self._derivations: DerivedWeights | None = derived
        self._borrowed = borrowed
        self._origin = origin
        self._is_packed = is_packed
        self._changed: set[str] = set()  # parameters whose values are not those of the origin
        self._missing: set[str] = set()  # parameters that have no values while the engine sleeps

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
            self._restore()
            names = self._derived.distinct(write(self._places(), source, self._put))  # type: ignore[arg-type]
            self._missing -= names
            if isinstance(source, FolderWeights):
                self._origin, self._changed = source.origin, set()
            else:
                self._changed |= names
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

    def check_release(self, level: SleepLevel) -> None:
        """Raise `WeightsError` where a sleep of this level would lose weights that it has to keep."""
        if self._changed and level in ("weights", "all"):
            raise WeightsError(
                f"{len(self._changed)} weights were updated since they were read from {self._origin}, which could not "
                "be read again: sleep with level='cache', save them and pass the folder to update_weights(), or sleep "
                "with level='discard' and update them before wake()"
            )

    def release(self) -> None:
        """Free the memory of weights until `reload`: packed copies, and all of a model that the engine loaded."""
        memory = self._derived.packed_memory() if self._is_packed else []
        if self._borrowed is None:
            memory += self._derived.remaining()
            self._missing = self._derived.distinct()
        for tensor in memory:
            release_memory(tensor)

    def reload(self) -> None:
        """Make or read again what was released and has not been updated since. Where that fails, it can be repeated.

        Raises `WeightsError`, `OutOfMemory`.
        """
        if self._borrowed is not None:
            self.follow_owner()
            return
        if lost := self._missing & self._changed:
            raise WeightsError(
                f"{len(lost)} weights were discarded ({listed(lost)}) and are not in {self._origin}: pass them to "
                "update_weights(), then call wake() again"
            )
        if not self._missing:
            return
        assert self._origin is not None, "neither borrowed nor read"
        self._restore()
        with reading(self._origin):
            values, places = named_weights(self._origin.read_again()), self._places()
            for name in sorted(self._missing):
                self._put(name, places[name], values[name])
                self._missing.remove(name)

    def close(self) -> None:
        """Let go of all weights."""
        self._module = self._borrowed = self._derivations = None

    def _restore(self) -> None:
        """Take back the memory of parameters that were released."""
        with reading(self._origin):
            for tensor in self._derived.remaining() if self._missing else ():
                restore_memory(tensor)

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

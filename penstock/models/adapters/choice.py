"""`adapters_for`: the store of adapters of a prepared model, over the kernels if it has them. Called by `Executor`."""

from __future__ import annotations

from penstock.models.adapters.packed import PackedAdapters
from penstock.models.adapters.table import TorchAdapters
from penstock.models.borrow import Borrowed
from penstock.models.preparation import PreparedModel


def adapters_for(model: PreparedModel, borrowed: Borrowed | None) -> PackedAdapters | TorchAdapters:
    """An empty store; `borrowed` is the live module that the model is a view of, if it is one."""
    owner = model.module if borrowed is None else borrowed.owner
    if model.native is None:
        return TorchAdapters(model.module, owner, model.device)
    return PackedAdapters(model.module, owner, model.weights, model.native)

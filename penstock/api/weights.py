"""The words of weight updates: where new weights come from, and what happens to requests meanwhile.

Types and their checks only. Called by engines that are `Trainable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Literal, get_args

from penstock.errors import RequestError, shown

# Named tensors, all at once or one by one; a folder of safetensors; None: the live module, whose owner has changed it.
WeightSource = Mapping[str, object] | Iterable[tuple[str, object]] | str | PathLike[str] | None
UpdateMode = Literal["abort", "wait", "keep"]
# What is released: the K/V cache, weights that can be made or read again, both, or both with weights that cannot be.
SleepLevel = Literal["cache", "weights", "all", "discard"]

_MODES = ("abort", "wait", "keep")
_LEVELS = get_args(SleepLevel)


def check_mode(mode: UpdateMode, stale_kv: bool = False) -> None:
    """Raise `RequestError` for an unknown mode, and for `stale_kv` with a mode that leaves no K/V to go on with."""
    if mode not in _MODES:
        raise RequestError(f"mode={shown(mode)} is unknown: use 'abort', 'wait' or 'keep'")
    if stale_kv and mode != "keep":
        raise RequestError(f"stale_kv=True has no effect with mode={mode!r}: use mode='keep', or leave stale_kv out")


def check_level(level: SleepLevel) -> None:
    """Raise `RequestError` for an unknown level."""
    if level not in _LEVELS:
        raise RequestError(f"level={shown(level)} is unknown: use 'cache', 'weights', 'all' or 'discard'")

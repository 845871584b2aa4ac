"""`Pairs`: the (row, token) pairs that a rule touches, on their way from lists to tensors.

Owns the conversion, which costs no tensor per row. Called by the rules.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor


class Pairs:
    """(row, token) pairs, collected without a tensor per row."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._tokens = array("q")

    def add(self, row: int, tokens: Iterable[int]) -> None:
        """Name tokens of one row."""
        before = len(self._tokens)
        self._tokens.extend(tokens)
        self._rows.append(row)
        self._lengths.append(len(self._tokens) - before)

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and tokens, int64 [K] each."""
        columns = [torch.tensor(values, dtype=torch.int64, device="cpu") for values in (self._rows, self._lengths)]
        rows = torch.repeat_interleave(*columns)
        return rows.to(device), int64(self._tokens, device)


def inside(tokens: Iterable[int], size: int) -> array[int]:
    """Those of the tokens that a vocabulary of `size` has, in order, each once."""
    return array("q", sorted({token for token in tokens if 0 <= token < size}))


def int64(values: array[int], device: torch.device) -> Tensor:
    """The same numbers on a device; not empty."""
    return torch.frombuffer(values, dtype=torch.int64).to(device)

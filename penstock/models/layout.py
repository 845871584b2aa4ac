"""`StepLayout`: a `StepPlan` as index tensors, made once per step and read by every layer's attention.

Owns the arithmetic from (block, offset) to cache slots and the grouping of rows; touches no key, value or weight.
Decode rows (one token) of similar context length are padded together; each longer row stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from penstock.step import Row


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """B one-token rows: `tokens` [B] are their places in the step, `slots` [B, L] their padded contexts.

    Padding repeats the row's newest slot: another one's NaN would survive a weight of 0. `visible` [B, 1, 1, L] is
    False on it; None when all contexts have the same length.
    """

    tokens: Tensor
    slots: Tensor
    visible: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """N tokens at places [begin, end) of the step; `slots` [L] is the context, `visible` [N, L] causal and windowed.

    All N tokens see the first `common` places of the context.
    """

    begin: int
    end: int
    slots: Tensor
    visible: Tensor
    common: int


@dataclass(slots=True)
class StepLayout:
    """Index tensors of one step, on the model's device.

    `input_ids` and `positions` are int64 [T]; `write_slots` [T] says where each token's K/V goes; `logit_places` says
    after which tokens logits are wanted, row by row.
    """

    rows: tuple[Row, ...]
    block_size: int
    device: torch.device
    input_ids: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    write_slots: Tensor = field(init=False)
    logit_places: Tensor = field(init=False)
    _contexts: list[np.ndarray] = field(init=False, default_factory=list)
    _windows: dict[int | None, tuple[list[DecodeGroup], list[PrefillRow]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        ids: list[int] = []
        for row in self.rows:
            ids += row.tokens[row.start : row.end]
            if row.end > len(row.tokens):
                ids += row.draft[max(0, row.start - len(row.tokens)) : row.end - len(row.tokens)]
        writes = [self._slots_of(row, row.start) for row in self.rows]
        places = [np.arange(row.start, row.end) for row in self.rows]
        self.input_ids = self._tensor(np.asarray(ids, dtype=np.int64))
        self.positions = self._tensor(np.concatenate(places))
        self.write_slots = self._tensor(np.concatenate(writes))
        self.logit_places = self._tensor(np.concatenate(self._wanted()))

    def groups(self, window: int | None) -> tuple[list[DecodeGroup], list[PrefillRow]]:
        """Rows grouped for attention in which a query sees at most the last `window` positions, itself included."""
        if not self._contexts:
            self._contexts = [self._slots_of(row, 0) for row in self.rows]
        if window not in self._windows:
            self._windows[window] = (self._decode_groups(window), self._prefill_rows(window))
        return self._windows[window]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)

    def _slots_of(self, row: Row, begin: int) -> np.ndarray:
        """Where positions [begin, end) of the row lie."""
        first, count = begin // self.block_size, -(-row.end // self.block_size)
        blocks = np.array(row.blocks[first:count], dtype=np.int64)
        slots = (blocks[:, None] * self.block_size + np.arange(self.block_size)).reshape(-1)
        return slots[begin - first * self.block_size : row.end - first * self.block_size]

    def _wanted(self) -> list[np.ndarray]:
        ends = np.cumsum([row.num_tokens for row in self.rows])
        return [np.arange(end - wanted_logits(row), end) for row, end in zip(self.rows, ends, strict=True)]

    def _decode_groups(self, window: int | None) -> list[DecodeGroup]:
        buckets: dict[int, list[tuple[int, np.ndarray]]] = {}
        begin = 0
        for row, slots in zip(self.rows, self._contexts, strict=True):
            if row.num_tokens == 1:
                seen = slots if window is None else slots[-window:]
                buckets.setdefault(_bucket(len(seen)), []).append((begin, seen))
            begin += row.num_tokens
        return [self._decode_group(members) for members in buckets.values()]

    def _decode_group(self, members: Sequence[tuple[int, np.ndarray]]) -> DecodeGroup:
        lengths = np.array([len(slots) for _, slots in members])
        longest = int(lengths.max())
        padded = np.empty((len(members), longest), dtype=np.int64)
        for i, (_, slots) in enumerate(members):
            padded[i, : len(slots)] = slots
            padded[i, len(slots) :] = slots[-1]
        visible = None
        if int(lengths.min()) < longest:
            visible = self._tensor(np.arange(longest) < lengths[:, None])[:, None, None, :]
        places = self._tensor(np.array([place for place, _ in members], dtype=np.int64))
        return DecodeGroup(places, self._tensor(padded), visible)

    def _prefill_rows(self, window: int | None) -> list[PrefillRow]:
        found, begin = [], 0
        for row, slots in zip(self.rows, self._contexts, strict=True):
            if row.num_tokens > 1:
                found.append(self._prefill_row(row, slots, begin, window))
            begin += row.num_tokens
        return found

    def _prefill_row(self, row: Row, slots: np.ndarray, begin: int, window: int | None) -> PrefillRow:
        first = 0 if window is None else max(0, row.start - window + 1)
        query = torch.arange(row.start, row.end, dtype=torch.int64, device=self.device)[:, None]
        context = torch.arange(first, row.end, dtype=torch.int64, device=self.device)[None, :]
        visible = context <= query
        if window is not None:
            visible &= context > query - window
        common = row.start if window is None or row.end <= window else 0
        return PrefillRow(begin, begin + row.num_tokens, self._tensor(slots[first:]), visible, common)


def _bucket(length: int) -> int:
    """Contexts whose padded work differs by at most a quarter share a bucket (quarter steps of a power of two)."""
    power = max(64, 1 << (length - 1).bit_length())
    step = power // 8
    return -(-length // step) * step


def wanted_logits(row: Row) -> int:
    """How many logit rows a plan row needs: all its positions, its newest (and each draft's), or none."""
    if scores_prompt(row):
        return row.num_tokens
    return 1 + len(row.draft) if row.samples else 0


def scores_prompt(row: Row) -> bool:
    """Whether the row has prompt tokens whose logprobs were asked for."""
    return row.params.prompt_logprobs is not None and row.start + 1 < row.prompt_len

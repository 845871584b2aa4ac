"""`StepLayout`: the rows of a step as index tensors, made once per step and read by every layer's attention.

Owns the arithmetic from (block, offset) to cache slots; touches no key, value or weight. Made by the executor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.step import Row


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Index tensors of one step, on the model's device; T tokens, row after row.

    `input_ids` and `positions` are int64 [T]; `write_slots` int64 [T] says where each token's K/V goes. Logits are
    needed after the tokens at `logit_indices`, int64 [L], of which `num_logits[i]` belong to row i: those in front of
    its scored tokens, then those that it draws from.
    """

    rows: tuple[Row, ...]
    block_size: int
    input_ids: Tensor
    positions: Tensor
    write_slots: Tensor
    logit_indices: Tensor
    num_logits: list[int]

    @classmethod
    def of(cls, rows: tuple[Row, ...], block_size: int, device: torch.device) -> StepLayout:
        """Lay out the rows of a plan."""
        ids: list[int] = []
        slots, positions, logit_indices, num_logits = [], [], [], []
        for row in rows:
            ids += row.tokens[row.start : row.end]
            if row.end > len(row.tokens):
                ids += row.draft[max(0, row.start - len(row.tokens)) : row.end - len(row.tokens)]
            slots.append(slots_of(row, row.start, block_size))
            positions.append(np.arange(row.start, row.end))
            if row.scored:
                first = len(ids) - row.end + row.scored.start - 1  # the logits before the first scored token
                logit_indices.append(np.arange(first, first + len(row.scored)))
            count = num_draws_of(row)
            num_logits.append(len(row.scored) + count)
            logit_indices.append(np.arange(len(ids) - count, len(ids)))
        return cls(
            rows,
            block_size,
            on_device(np.asarray(ids, dtype=np.int64), device),
            on_device(np.concatenate(positions), device),
            on_device(np.concatenate(slots), device),
            on_device(np.concatenate(logit_indices), device),
            num_logits,
        )


def slots_of(row: Row, begin: int, block_size: int) -> np.ndarray:
    """Cache slots of the row's positions [begin, end), int64."""
    first_block, num_blocks = begin // block_size, -(-row.end // block_size)
    blocks = np.array(row.blocks[first_block:num_blocks], dtype=np.int64)
    slots = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
    return slots[begin - first_block * block_size : row.end - first_block * block_size]


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor, copied only where the device is another one or the array is not contiguous."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def num_draws_of(row: Row) -> int:
    """After how many of its last tokens a row draws the next one: after the newest and each draft, if it samples."""
    return 1 + len(row.draft) if row.samples else 0

"""What `training` makes with torch: padded tensors.

Imported when the first result is a tensor, because importing torch takes seconds. Called by the backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.models.borrow import device_and_dtype
from penstock.scores import FloatArray


def padded(rows: Sequence[FloatArray | None], device: str) -> tuple[Tensor, Tensor]:
    """(values, mask): rows of any lengths R as float32 [rows, longest R, ...], 0.0 behind their ends.

    None is a row of length 0. The mask is bool [rows, longest R], True up to the ends.
    """
    lengths = [0 if row is None else len(row) for row in rows]
    shape = next((row.shape[1:] for row in rows if row is not None), ())
    values = torch.zeros((len(rows), max(lengths, default=0), *shape), dtype=torch.float32, device=device)
    for row_values, length, row in zip(values, lengths, rows, strict=True):
        if row is not None:
            row_values[:length] = torch.from_numpy(row)
    ends = torch.tensor(lengths, dtype=torch.long, device=device)
    mask = torch.arange(values.shape[1], dtype=torch.long, device=device) < ends[:, None]
    return values, mask


def device_of(module: nn.Module) -> str:
    """Where the module's parameters are."""
    return str(device_and_dtype(module)[0])


def has_gpu() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()

"""The text that quantization is calibrated with: `calibration_ids`.

Owns `calibration.txt`: prose, code, tables, mathematics, several languages. Called by `loading`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

MIN_TOKENS, MAX_TOKENS = 64, 512  # fewer say too little about a layer's inputs, more gain little

_TEXT = Path(__file__).with_suffix(".txt")


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


def calibration_ids(tokenizer: object, max_length: int, vocab_size: int, device: torch.device) -> Tensor | None:
    """The first tokens of the text, int64 [T]; None without a tokenizer, or with one that does not encode it."""
    if tokenizer is None:
        return None
    try:
        ids = cast(_Encoder, tokenizer).encode(_TEXT.read_text(encoding="utf-8"))[: min(max_length, MAX_TOKENS)]
        if len(ids) < MIN_TOKENS or not all(0 <= token < vocab_size for token in ids):
            return None
        return torch.tensor(ids, dtype=torch.int64, device=device)
    except Exception:  # the caller's own tokenizer may fail or return anything; weights are rounded without calibration
        return None

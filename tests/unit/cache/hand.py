"""Sequences made by hand, and what a scheduler does to them."""

from __future__ import annotations

from itertools import count
from typing import Any

from penstock.cache.manager import CacheManager
from penstock.sampling import SamplingParams
from penstock.sequence import Sequence

numbers = count()


def sequence(tokens: list[int], **fields: Any) -> Sequence:
    number = next(numbers)
    values: dict[str, Any] = {
        "id": number,
        "request_id": str(number),
        "params": SamplingParams(),
        "max_len": 40,
    } | fields
    return Sequence(tokens=list(tokens), **values)


def run(cache: CacheManager, seq: Sequence, end: int | None = None) -> int:
    """What a scheduler does to prefill a sequence up to `end`; the number of cached tokens."""
    cached = start(cache, seq)
    compute(cache, seq, end)
    return cached


def start(cache: CacheManager, seq: Sequence) -> int:
    seq.computed = cache.attach(seq)
    return seq.computed


def compute(cache: CacheManager, seq: Sequence, end: int | None = None) -> tuple[tuple[int, int], ...]:
    end = seq.length if end is None else end
    assert cache.reserve(seq, end)
    cache.seal(seq, min(end, seq.length))
    copies = cache.take_moves().copies
    cache.commit()
    seq.computed = end
    return copies

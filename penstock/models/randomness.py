"""Randomness that depends on nothing but its key: counter-based uniforms, and the inverse of a cumulative sum.

Never touches torch's, Python's or the system's generators, and keeps no state, so that neighbours, preemption and
chunking cannot change a draw. Called by the sampler.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: BLAKE2b of the key. The key may be any integers, of any size and sign."""
    digest = blake2b(b"%d %d %d" % (seed, sample_index, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def locate(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Find the step of its row's cumulative sum that each target falls into.

    cumulative float64 [R, N], ascending; target float64 [R]. Returns the first index [R] whose sum exceeds the
    target, and what the target exceeds the sum before it by [R]. A target at or above the total counts as just
    below it, so the index never lands on a step of zero.
    """
    total = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))[:, None]
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)
    preceding_sum = cumulative.gather(1, (index - 1).clamp_(min=0)).masked_fill_(index == 0, 0.0)
    return index[:, 0], (target - preceding_sum)[:, 0]


def draw_from_chunks(weights: Tensor, cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row in proportion to its weight, in vocabulary order.

    weights float32 [R, N, C]; cumulative float64 [R, N], the running sum of the N chunks' totals; uniforms float64
    [R] in [0, 1). Returns tokens int64 [R]. Two levels, so that only one chunk per row is summed in float64.
    """
    chunk, remainder = locate(cumulative, uniforms * cumulative[:, -1])
    row = torch.arange(len(chunk), dtype=torch.int64, device=chunk.device)
    cumulative_in_chunk = weights[row, chunk].double().cumsum(-1)
    return chunk * weights.shape[2] + locate(cumulative_in_chunk, remainder)[0]


def draw_from_candidates(ids: Tensor, weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one of each row's candidates in proportion to its weight, in vocabulary order.

    ids int64 [R, W]; weights float64 [R, W], 0 for what must not be drawn. Returns tokens int64 [R] and the weights'
    sums float64 [R]. Candidates of weight 0 change nothing, so neither does their number.
    """
    ids, cumulative = in_vocabulary_order(ids, weights)
    total = cumulative[:, -1]
    index, _ = locate(cumulative, uniforms * total)
    return ids.gather(1, index[:, None])[:, 0], total


def in_vocabulary_order(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's candidates [R, W] sorted by id, and the running sum of their weights float64 [R, W] in that order."""
    ids, order = ids.sort(-1)
    return ids, weights.gather(1, order).cumsum(-1)

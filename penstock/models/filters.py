"""Sampling filters as pure functions of tensors: temperature, top-k, top-p and min-p, each row with its own values.

Owns which tokens stay in the draw, in transformers' sequence: top-k, then top-p of what is left, then min-p relative
to the greatest. Keeps no state, draws nothing. Called by the sampler: on a few candidates where they settle it, on
the whole vocabulary where they do not. A weight is exp((logit - the row's greatest) / temperature).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.models.vocabulary import in_order

_BITS_OF_ONE = 0x3F800000  # the greatest weight is 1.0; a float32's bits rise with its value
_BAND_BITS = 18  # weights in one band differ by at most 1/32
_NUM_BANDS = (_BITS_OF_ONE >> _BAND_BITS) + 1


@dataclass(frozen=True, slots=True)
class Filters:
    """Each row's temperature and filters, all [R]: top_k int64 (0 is off), the others float64 (top_p 1 is off)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def take(self, rows: Tensor) -> Filters:
        """The same for some rows."""
        return Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


def filter_candidates(logits: Tensor, peak: Tensor, total: Tensor, p: Filters) -> tuple[Tensor, Tensor]:
    """Apply top-k, top-p and min-p to each row's greatest logits.

    logits float32 [R, W], the W greatest of each row, descending; peak float32 [R], the greatest; total float64 [R],
    the whole row's weight, read where top_k is off. Returns the candidates' weights float64 [R, W], 0 if dropped,
    and bool [R]: whether all that is kept is surely among the candidates.
    """
    edge = logits[:, -1]
    weights = ((logits - peak[:, None]) / p.temperature[:, None].float()).double().exp()
    kth = logits.gather(1, (p.top_k - 1).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    kth = kth.masked_fill(p.top_k == 0, -torch.inf)
    weights = weights.masked_fill(logits < kth[:, None], 0.0)
    cumulative = weights.cumsum(-1)
    need = p.top_p * torch.where(p.top_k > 0, cumulative[:, -1], total)
    need = need.masked_fill(p.top_p >= 1, torch.inf)
    before = F.pad(cumulative[:, :-1], (1, 0))
    weights = weights.masked_fill((before >= need[:, None]) | (weights < p.min_p[:, None]), 0.0)
    least = logits.masked_fill(weights == 0, torch.inf).amin(-1)
    sure = (least > edge) & ((p.top_k == 0) | (kth > edge)) & (p.top_k <= logits.shape[1])
    return weights, sure | (edge == -torch.inf)


def filter_vocabulary(logits: Tensor, weights: Tensor, p: Filters) -> Tensor:
    """Apply top-k, top-p and min-p to whole rows: logits and weights float32 [R, V]; returns weights, 0 if dropped."""
    most = int(p.top_k.max())
    if most:
        most = min(most, logits.shape[1])
        kth = logits.topk(most).values.gather(1, (p.top_k - 1).clamp(0, most - 1)[:, None])
        weights = weights.masked_fill((logits < kth) & (p.top_k > 0)[:, None], 0.0)
    if bool((p.top_p < 1).any()):
        weights = nucleus(weights, p.top_p)
    return drop_below(weights, p.min_p) if bool((p.min_p > 0).any()) else weights


def drop_below(weights: Tensor, min_p: Tensor) -> Tensor:
    """Min-p [1]: drop weights float32 [R, V] below min_p float64 [R] times the greatest, which is 1.

    [1] Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    """
    kept = torch.empty_like(weights)
    torch.ge(weights, min_p[:, None].float(), out=kept)
    return kept.mul_(weights)


def nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Top-p [1] without sorting the row: keep the fewest greatest weights whose sum reaches top_p of the row's.

    weights float32 [R, V] in [0, 1]; top_p float64 [R], 1 keeps all. Sums are float64. A histogram of the mass finds
    the narrow band of weights in which the sum is reached, and only the band is sorted. Of equal weights the first
    tokens are kept. [1] Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    band = ((_BITS_OF_ONE - weights.view(torch.int32)) >> _BAND_BITS).clamp_(0, _NUM_BANDS - 1)
    mass = torch.zeros(len(weights), _NUM_BANDS, dtype=torch.float64, device=weights.device)
    reached = mass.scatter_add_(1, band.long(), weights.double()).cumsum(-1)
    need = (top_p * reached[:, -1]).masked_fill_(top_p >= 1, torch.inf)[:, None]
    last = (reached < need).sum(-1, keepdim=True).clamp_(max=_NUM_BANDS - 1)
    above = reached.gather(1, (last - 1).clamp(min=0)).masked_fill_(last == 0, 0.0)
    values, tokens = _members(weights, band == last)
    before = above + F.pad(values.double().cumsum(-1)[:, :-1], (1, 0))
    row, column = ((before >= need) & (values > 0)).nonzero(as_tuple=True)
    kept = weights.masked_fill(band > last, 0.0)
    kept[row, tokens[row, column]] = 0.0
    return kept


def _members(weights: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The weights that are `inside`, bool [R, V], and their tokens: packed to the left, in order, then zeros."""
    row, token = inside.nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(weights))
    column = torch.arange(len(row), dtype=torch.int64, device=row.device) - (count.cumsum(0) - count)[row]
    values = torch.zeros(len(weights), int(count.max()), dtype=weights.dtype, device=weights.device)
    tokens = torch.zeros_like(values, dtype=torch.int64)
    values[row, column] = weights[row, token]
    tokens[row, column] = token
    return in_order(values, tokens)

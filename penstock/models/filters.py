"""Sampling filters as pure functions of tensors, each row with its own values: which tokens stay in the draw.

Applied in transformers' order: top-h, top-k, top-p, min-p, typical-p, epsilon, eta. Keeps no state, draws nothing.
Called by the sampler: `filter_candidates` on a few candidates where these are sure to hold all that is kept,
`filter_vocabulary` on the whole vocabulary where they are not, and `apply_all_filters` for the few requests with a
filter beyond top-k, top-p and min-p. A weight is exp((logit - the row's greatest) / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.models.vocabulary import in_order
from penstock.step import Row

_BITS_OF_ONE = 0x3F800000  # the greatest weight is 1.0; a float32's bits rise with its value
_BAND_BITS = 18  # weights in one band differ by at most 1/32
_NUM_BANDS = (_BITS_OF_ONE >> _BAND_BITS) + 1
_TOP_H_WIDTH = 100  # top-h considers so many of the likeliest tokens
_OFF = 2.0  # a probability that nothing reaches


@dataclass(frozen=True, slots=True)
class Filters:
    """Each row's temperature and filters, all [R]: top_k int64 (0 is off), the others float64 (top_p 1 is off)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def take(self, rows: Tensor) -> Filters:
        """A copy for some rows."""
        return Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


def filter_candidates(logits: Tensor, peak: Tensor, total: Tensor, p: Filters) -> tuple[Tensor, Tensor]:
    """Apply top-k, top-p and min-p to each row's greatest logits.

    logits float32 [R, W], the W greatest of each row, descending; peak float32 [R], the greatest; total float64 [R],
    the whole row's weight, read where top_k is off. Returns the candidates' weights float64 [R, W], 0 if dropped,
    and bool [R]: whether the candidates are sure to include every token that is kept.
    """
    edge = logits[:, -1]
    weights = ((logits - peak[:, None]) / p.temperature[:, None].float()).double().exp()
    kth = logits.gather(1, (p.top_k - 1).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    kth = kth.masked_fill(p.top_k == 0, -torch.inf)
    weights = weights.masked_fill(logits < kth[:, None], 0.0)
    cumulative = weights.cumsum(-1)
    threshold = p.top_p * torch.where(p.top_k > 0, cumulative[:, -1], total)
    threshold = threshold.masked_fill(p.top_p >= 1, torch.inf)
    preceding_sum = F.pad(cumulative[:, :-1], (1, 0))
    dropped = (preceding_sum >= threshold[:, None]) | (weights < p.min_p[:, None])
    weights = weights.masked_fill(dropped, 0.0)
    smallest = logits.masked_fill(weights == 0, torch.inf).amin(-1)
    sure = (smallest > edge) & ((p.top_k == 0) | (kth > edge)) & (p.top_k <= logits.shape[1])
    return weights, sure | (edge == -torch.inf)


def filter_vocabulary(logits: Tensor, weights: Tensor, p: Filters) -> Tensor:
    """Apply top-k, top-p and min-p to whole rows: logits and weights float32 [R, V]; returns weights, 0 if dropped."""
    width = int(p.top_k.max())
    if width:
        width = min(width, logits.shape[1])
        kth = logits.topk(width).values.gather(1, (p.top_k - 1).clamp(0, width - 1)[:, None])
        weights = weights.masked_fill((logits < kth) & (p.top_k > 0)[:, None], 0.0)
    if bool((p.top_p < 1).any()):
        weights = nucleus(weights, p.top_p)
    return drop_below(weights, p.min_p) if bool((p.min_p > 0).any()) else weights


def drop_below(weights: Tensor, min_p: Tensor) -> Tensor:
    """Min-p [1]: drop weights float32 [R, V] below min_p float64 [R] times the greatest, which is 1.

    [1] Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    """
    filtered = torch.empty_like(weights)
    torch.ge(weights, min_p[:, None].float(), out=filtered)
    return filtered.mul_(weights)


def nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Top-p [1] without sorting the row: keep the fewest greatest weights whose sum reaches top_p of the row's.

    weights float32 [R, V] in [0, 1]; top_p float64 [R], 1 keeps all. Sums are float64. A histogram of the mass finds
    the narrow band of weights in which the sum is reached, and only the band is sorted. Of equal weights the first
    tokens are kept. [1] Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    band = ((_BITS_OF_ONE - weights.view(torch.int32)) >> _BAND_BITS).clamp_(0, _NUM_BANDS - 1)
    mass = torch.zeros(len(weights), _NUM_BANDS, dtype=torch.float64, device=weights.device)
    cumulative = mass.scatter_add_(1, band.long(), weights.double()).cumsum(-1)
    threshold = (top_p * cumulative[:, -1]).masked_fill_(top_p >= 1, torch.inf)[:, None]
    edge_band = (cumulative < threshold).sum(-1, keepdim=True).clamp_(max=_NUM_BANDS - 1)
    mass_above = cumulative.gather(1, (edge_band - 1).clamp(min=0)).masked_fill_(edge_band == 0, 0.0)
    values, tokens = _packed_in_order(weights, band == edge_band)
    preceding_sum = mass_above + F.pad(values.double().cumsum(-1)[:, :-1], (1, 0))
    row, column = ((preceding_sum >= threshold) & (values > 0)).nonzero(as_tuple=True)
    filtered = weights.masked_fill(band > edge_band, 0.0)
    filtered[row, tokens[row, column]] = 0.0
    return filtered


def _packed_in_order(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The weights under a mask, bool [R, V], and their tokens: packed to the left, in order, then zeros."""
    row, token = mask.nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(weights))
    column = torch.arange(len(row), dtype=torch.int64, device=row.device) - (count.cumsum(0) - count)[row]
    values = torch.zeros(len(weights), int(count.max()), dtype=weights.dtype, device=weights.device)
    tokens = torch.zeros_like(values, dtype=torch.int64)
    values[row, column] = weights[row, token]
    tokens[row, column] = token
    return in_order(values, tokens)


def apply_all_filters(logits: Tensor, weights: Tensor, p: Filters, rows: Sequence[Row]) -> Tensor:
    """Apply every filter to whole rows: logits and weights float32 [R, V]; returns weights, 0 if dropped.

    The eta cutoff [1] drops what is less likely than both eta and sqrt(eta) * exp(-entropy).
    [1] Hewitt et al. 2022, https://arxiv.org/abs/2210.15191.
    """
    values = [
        (
            _OFF if params.top_h is None else params.top_h,
            _OFF if params.typical_p >= 1 else params.typical_p,
            params.epsilon_cutoff,
            params.eta_cutoff,
        )
        for params in (row.params for row in rows)
    ]
    columns = torch.tensor(values, dtype=torch.float64, device=logits.device).T[:, :, None]
    top_h, typical_p, epsilon, eta = columns
    weights = filter_vocabulary(logits, _top_h(weights, top_h), p)
    weights = _typical(weights, typical_p)
    weights = _drop_unlikely(weights, epsilon)
    return _drop_unlikely(weights, torch.minimum(eta, eta.sqrt() * torch.exp(-_entropy(_probabilities(weights)))))


def _top_h(weights: Tensor, top_h: Tensor) -> Tensor:
    """Top-h [1]: keep the greatest while their part of the entropy is at most top_h of it, and the greatest itself.

    [1] https://arxiv.org/abs/2509.02510
    """
    if not bool((top_h < _OFF).any()):
        return weights
    greatest = weights.topk(min(_TOP_H_WIDTH, weights.shape[1]))
    terms = _entropy_terms(_probabilities(greatest.values))
    mask = terms.cumsum(-1) <= terms.sum(-1, keepdim=True) * top_h
    mask[:, 0] = True
    filtered = torch.zeros_like(weights).scatter_(1, greatest.indices, torch.where(mask, greatest.values, 0.0))
    return torch.where(top_h < _OFF, filtered, weights)


def _typical(weights: Tensor, mass: Tensor) -> Tensor:
    """Typical-p [1]: keep those whose surprise is nearest to the entropy, until they make up `mass`.

    [1] Meister et al. 2022, https://arxiv.org/abs/2202.00666
    """
    if not bool((mass < _OFF).any()):
        return weights
    probabilities = _probabilities(weights)
    distance = (-probabilities.log() - _entropy(probabilities)).abs()  # infinite where nothing is left
    ordered, order = distance.sort(-1)
    reached = (probabilities.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=weights.shape[1] - 1)
    dropped = distance > ordered.gather(1, reached)
    dropped.scatter_(1, order[:, :1], False)
    return weights.masked_fill(dropped, 0.0)


def _drop_unlikely(weights: Tensor, threshold: Tensor) -> Tensor:
    """Drop what is less likely than `threshold` [R, 1], except for the greatest."""
    dropped = (_probabilities(weights) < threshold) & (weights < weights.amax(-1, keepdim=True))
    return weights.masked_fill(dropped, 0.0)


def _probabilities(weights: Tensor) -> Tensor:
    weights = weights.double()
    return weights / weights.sum(-1, keepdim=True)


def _entropy_terms(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities)


def _entropy(probabilities: Tensor) -> Tensor:
    return _entropy_terms(probabilities).sum(-1, keepdim=True)

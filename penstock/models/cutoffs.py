"""Sampling filters that few requests use, as functions of tensors: top-h, typical-p, epsilon and eta cutoffs.

Owns what stays in the draw of a request with any of them, in transformers' sequence: top-h, the usual filters,
typical-p, epsilon, eta. Keeps no state, draws nothing. Called by the sampler with those rows only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.filters import Filters, filter_vocabulary
from penstock.step import Row

_TOP_H_WIDTH = 100  # how many of the likeliest tokens top-h looks at
_OFF = 2.0  # a share that nothing reaches


def cut(logits: Tensor, weights: Tensor, p: Filters, rows: Sequence[Row]) -> Tensor:
    """Apply every filter to whole rows: logits and weights float32 [R, V]; returns weights, 0 if dropped."""
    values = [
        (
            _OFF if q.top_h is None else q.top_h,
            _OFF if q.typical_p >= 1 else q.typical_p,
            q.epsilon_cutoff,
            q.eta_cutoff,
        )
        for q in (row.params for row in rows)
    ]
    columns = torch.tensor(values, dtype=torch.float64, device=logits.device).T[:, :, None]
    top_h, typical_p, epsilon, eta = columns
    weights = filter_vocabulary(logits, _within_entropy(weights, top_h), p)
    weights = _typical(weights, typical_p)
    weights = _above(weights, epsilon)
    return _above(weights, torch.minimum(eta, eta.sqrt() * torch.exp(-_entropy(_shares(weights)))))


def _within_entropy(weights: Tensor, top_h: Tensor) -> Tensor:
    """Top-h [1]: keep the greatest while their part of the entropy is at most top_h of it, and the greatest itself.

    [1] https://arxiv.org/abs/2509.02510
    """
    if not bool((top_h < _OFF).any()):
        return weights
    greatest = weights.topk(min(_TOP_H_WIDTH, weights.shape[1]))
    shares = _shares(greatest.values)
    parts = _parts_of_entropy(shares)
    kept = parts.cumsum(-1) <= parts.sum(-1, keepdim=True) * top_h
    kept[:, 0] = True
    cut = torch.zeros_like(weights).scatter_(1, greatest.indices, torch.where(kept, greatest.values, 0.0))
    return torch.where(top_h < _OFF, cut, weights)


def _typical(weights: Tensor, mass: Tensor) -> Tensor:
    """Typical-p [1]: keep those whose surprise is nearest to the entropy, until they make up `mass`.

    [1] Meister et al. 2022, https://arxiv.org/abs/2202.00666
    """
    if not bool((mass < _OFF).any()):
        return weights
    shares = _shares(weights)
    distance = (-shares.log() - _entropy(shares)).abs()  # infinite where nothing is left
    ordered, order = distance.sort(-1)
    reached = (shares.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=weights.shape[1] - 1)
    dropped = distance > ordered.gather(1, reached)
    dropped.scatter_(1, order[:, :1], False)
    return weights.masked_fill(dropped, 0.0)


def _above(weights: Tensor, least: Tensor) -> Tensor:
    """Drop what is less likely than `least` [R, 1], but for the greatest."""
    dropped = (_shares(weights) < least) & (weights < weights.amax(-1, keepdim=True))
    return weights.masked_fill(dropped, 0.0)


def _shares(weights: Tensor) -> Tensor:
    weights = weights.double()
    return weights / weights.sum(-1, keepdim=True)


def _parts_of_entropy(shares: Tensor) -> Tensor:
    return -torch.xlogy(shares, shares)


def _entropy(shares: Tensor) -> Tensor:
    return _parts_of_entropy(shares).sum(-1, keepdim=True)

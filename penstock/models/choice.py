"""Which token a row takes from which distribution: the one drawn for it, or one that was given and is to be scored.

Owns how rows are grouped for it, and the passes over their logits. Never applies a rule and never sees a sequence's
state. Called by the sampler with logits after every rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, Self

import torch
from torch import Tensor

from penstock.kernels.logits import Distributions, LogitKernels
from penstock.models import rules
from penstock.models.filters import Filters, apply_all_filters, filter_candidates, filter_vocabulary
from penstock.models.masking import masked_copy
from penstock.models.randomness import draw_from_candidates, draw_from_chunks, in_vocabulary_order, uniform
from penstock.models.vocabulary import Vocabulary, Weights, in_order
from penstock.step import Row

_MIN_CANDIDATES = 128  # holds most nuclei
_MAX_CANDIDATES = 1024  # above, passes over the vocabulary are cheaper


class Method(Enum):
    """How a row's token is chosen."""

    GREEDY = "greedy"  # the greatest logit
    FULL = "full"  # a draw from the whole vocabulary
    MIN_P = "min_p"  # a draw from the vocabulary after min-p
    NUCLEUS = "nucleus"  # a draw from the top-p of the vocabulary
    TOP_K = "top_k"  # a draw from the top-k, and the top-p of that
    ALL_FILTERS = "all_filters"  # a draw after filters beyond top-k, top-p and min-p


@dataclass(frozen=True, slots=True)
class Group:
    """What rows that are computed together have in common.

    `plain`: no rules and temperature 1, so that the model's own probabilities serve. `width`: how many candidates to
    try before the whole vocabulary, 0 for none. `masked`: a grammar allows some tokens only.
    """

    method: Method
    ruled: bool
    plain: bool
    width: int
    masked: bool = False

    @property
    def takes_one_pass(self) -> bool:
        """Whether `choose_in_one_pass` computes it."""
        return self.width > 0 or self.method in (Method.GREEDY, Method.FULL, Method.MIN_P)


PLAIN_GREEDY = Group(Method.GREEDY, False, False, 0)
MASKED_GREEDY = Group(Method.GREEDY, False, False, 0, True)


@dataclass(frozen=True, slots=True)
class Choice:
    """Per row: the token int64, its log probability in the draw float64, and whether any token was possible, bool."""

    token: Tensor
    sampled: Tensor
    possible: Tensor

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> Choice:
        """For `num_rows` rows, to be filled by `put`."""
        token = torch.zeros(num_rows, dtype=torch.int64, device=device)
        return cls(token, torch.zeros_like(token, dtype=torch.float64), torch.zeros_like(token, dtype=torch.bool))

    @classmethod
    def greedy(cls, peaks: Tensor, tokens: Tensor) -> Choice:
        """Of the tokens [R] with the greatest logits [R] that may follow, which are possible if these are finite."""
        return cls(tokens, torch.zeros_like(peaks, dtype=torch.float64), peaks.isfinite())

    def put(self, rows: Tensor, choice: Choice) -> None:
        """Write the choices of some rows."""
        self.token[rows] = choice.token
        self.sampled[rows] = choice.sampled
        self.possible[rows] = choice.possible


def group_of(row: Row, size: int) -> Group:
    p = row.params
    ruled, masked = rules.has_rules(row), row.constraint is not None
    if p.greedy:
        return Group(Method.GREEDY, True, False, 0, masked) if ruled else MASKED_GREEDY if masked else PLAIN_GREEDY
    if p.is_cut:
        return Group(Method.ALL_FILTERS, ruled, False, 0, masked)
    if p.top_k:
        return Group(Method.TOP_K, ruled, False, _width(p.top_k, size), masked)
    plain = not ruled and not masked and p.temperature == 1
    if p.top_p < 1:
        return Group(Method.NUCLEUS, ruled, plain, _width(0, size), masked)
    return Group(Method.MIN_P if p.min_p else Method.FULL, ruled, plain, 0, masked)


def _width(top_k: int, size: int) -> int:
    """Candidates for the top-k and for ties with its last one, in powers of 2 so that there are few groups."""
    if size <= _MAX_CANDIDATES:
        return size
    width = max(_MIN_CANDIDATES, 1 << (top_k + top_k // 2).bit_length())
    return width if width <= _MAX_CANDIDATES else 0


class Picks(Protocol):
    """The tokens that rows take from their distributions."""

    def from_vocabulary(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Tokens int64 [R], and the mass float64 [R] of all that could have been drawn."""
        ...

    def from_candidates(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The same from candidates: tokens int64 [R, W], weights float64 [R, W], 0 for what must not be drawn."""
        ...

    def take(self, rows: Tensor) -> Self:
        """The same for some rows."""
        ...


@dataclass(frozen=True, slots=True)
class Draws:
    """Tokens drawn by one uniform number each, float64 [R] in [0, 1)."""

    uniforms: Tensor

    def from_vocabulary(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Draw in vocabulary order."""
        return draw_from_chunks(weights.values, weights.cumulative, self.uniforms), weights.total

    def from_candidates(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Draw in vocabulary order."""
        return draw_from_candidates(tokens, weights, self.uniforms)

    def take(self, rows: Tensor) -> Draws:
        """The same for some rows."""
        return Draws(self.uniforms[rows])


@dataclass(frozen=True, slots=True)
class Given:
    """Tokens int64 [R] to be scored. The mass of one that cannot be drawn is infinite: its probability is 0."""

    tokens: Tensor

    def from_vocabulary(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """The given tokens."""
        token_weights = weights.values.flatten(1).gather(1, self.tokens[:, None])[:, 0]
        return self.tokens, weights.total.masked_fill(token_weights == 0, torch.inf)

    def from_candidates(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The given tokens."""
        _, cumulative = in_vocabulary_order(tokens, weights)
        is_kept = ((tokens == self.tokens[:, None]) & (weights > 0)).any(-1)
        return self.tokens, cumulative[:, -1].masked_fill(~is_kept, torch.inf)

    def take(self, rows: Tensor) -> Given:
        """The same for some rows."""
        return Given(self.tokens[rows])


def choose(
    group: Group, ruled: Vocabulary, weights: Weights | None, rows: Sequence[Row], given: Tensor | None = None
) -> Choice:
    """Choose by the logits after every rule, or score the tokens `given`, int64 [R].

    `weights` are those of `ruled`, where they exist already.
    """
    possible = ruled.peak.isfinite()
    if group.method is Method.GREEDY:
        return _greedy_choice(ruled.argmax(), given, possible)
    p, uniforms = _parameters(rows, ruled.peak.device)
    picks: Picks = Draws(uniforms) if given is None else Given(given)
    if group.width:
        candidates, total = in_order(*ruled.candidates(group.width)), _total(group, ruled, weights, p)
        token, mass, unsure = _from_candidates(candidates, ruled.peak, total, p, picks)
        if group.width < ruled.size and len(unsure):
            token[unsure], mass[unsure] = _from_all(ruled.take(unsure), p.take(unsure), picks.take(unsure))
    else:
        weights = ruled.weights(p.temperature) if weights is None else weights
        if group.method is Method.ALL_FILTERS:
            values = apply_all_filters(ruled.flat, weights.values.flatten(1), p, rows)
            weights = Weights.of(values.view_as(weights.values))
        filters = None if group.method in (Method.FULL, Method.ALL_FILTERS) else p
        token, mass = _from_vocabulary(ruled, weights, filters, picks)
    scaled = (ruled.at(token).double() - ruled.peak.double()) / p.temperature
    return Choice(token, scaled - mass.log(), possible)


def choose_in_one_pass(
    group: Group, logits: Vocabulary, index: Tensor, masks: Tensor | None, rows: Sequence[Row],
    given: Tensor | None = None,
) -> Choice:  # fmt: skip
    """`choose` for what kernels compute in one pass over the logits or less, masks included, without a copy.

    `logits` are those after every rule, `index` int64 [R] the place of each row in them, `masks` int32 [R, W]. No token
    of a row with a NaN is possible. Rows that may keep more than their candidates are copied, one after the other.
    """
    kernels, peaks = logits.kernels, logits.peak[index]
    assert kernels is not None
    tokens = logits.argmax()[index] if group.method is Method.GREEDY and masks is None else index
    if masks is not None:
        allowed_peaks, tokens = kernels.argmax_allowed(logits.flat, logits.chunk_peaks, index, masks)
        peaks = torch.where(peaks.isnan(), peaks, allowed_peaks)
    if group.method is Method.GREEDY:
        return _greedy_choice(tokens, given, peaks.isfinite())
    p, uniforms = _parameters(rows, index.device)
    distributions = Distributions(index, peaks, p.temperature.float(), p.min_p.float(), masks)
    if group.width:
        picks = Draws(uniforms) if given is None else Given(given)
        token, mass = _from_greatest(group, logits, kernels, distributions, p, picks)
    elif given is None:
        token, _, mass = kernels.draw(logits.flat, distributions, uniforms)
    else:
        token, weights, totals = kernels.weigh(logits.flat, distributions, given)
        mass = totals.masked_fill(weights == 0, torch.inf)
    scaled = (logits.flat[index, token].double() - peaks.double()) / p.temperature
    return Choice(token, scaled - mass.log(), peaks.isfinite())


def _from_greatest(
    group: Group, logits: Vocabulary, kernels: LogitKernels, of: Distributions, p: Filters, picks: Picks
) -> tuple[Tensor, Tensor]:
    """Pick after top-k, top-p and min-p: tokens [R], and the mass [R] of all that could have been drawn."""
    candidates = kernels.greatest(logits.flat, logits.chunk_peaks, of.rows, group.width, of.masks)
    if group.method is Method.TOP_K:
        total = torch.ones_like(p.top_p)
    elif group.plain and logits.total is not None:
        total = logits.total[of.rows]
    else:
        unfiltered = of._replace(floors=torch.zeros_like(of.floors))
        total = kernels.weigh(logits.flat, unfiltered, torch.zeros_like(of.rows)).totals
    token, mass, unsure = _from_candidates(candidates, of.peaks, total, p, picks)
    if group.width < logits.size:
        for row in unsure[:, None]:  # what follows takes some passes over a row, which stays in the cache
            index = of.rows[row]
            copy = logits.take(index) if of.masks is None else masked_copy(logits, index, of.masks[row])
            token[row], mass[row] = _from_all(copy, p.take(row), picks.take(row))
    return token, mass


def _total(group: Group, ruled: Vocabulary, weights: Weights | None, p: Filters) -> Tensor:
    """The sum of each row's weights, float64 [R]; any number for top-k, which does not need it."""
    if group.method is Method.TOP_K:
        return torch.ones_like(p.top_p)
    if weights is not None:
        return weights.total
    return ruled.total if group.plain and ruled.total is not None else ruled.weight_total(p.temperature)


def _greedy_choice(token: Tensor, given: Tensor | None, possible: Tensor) -> Choice:
    """Of the token with the greatest logit in each row, int64 [R]."""
    sampled = torch.zeros_like(token, dtype=torch.float64)
    if given is None:
        return Choice(token, sampled, possible)
    return Choice(given, sampled.masked_fill(given != token, -torch.inf), possible)


def _parameters(rows: Sequence[Row], device: torch.device) -> tuple[Filters, Tensor]:
    values = [
        (p.temperature, p.top_k, p.top_p, p.min_p, uniform(row.seed, row.sample_index, row.end))
        for row in rows
        for p in (row.params,)
    ]
    temperature, top_k, top_p, min_p, uniforms = (
        torch.tensor(values, dtype=torch.float64, device="cpu").T.contiguous().to(device)
    )
    temperature = temperature.clamp(rules.FLOAT_TINY, rules.FLOAT_MAX)  # logits are divided by it in float32
    return Filters(temperature, top_k.long(), top_p, min_p), uniforms


def _from_vocabulary(logits: Vocabulary, weights: Weights, p: Filters | None, picks: Picks) -> tuple[Tensor, Tensor]:
    """Pick from the whole vocabulary: tokens [R], and the mass [R] of all that could have been drawn."""
    if p is not None:
        values = filter_vocabulary(logits.flat, weights.values.flatten(1), p)
        weights = Weights.of(values.view_as(weights.values))
    return picks.from_vocabulary(weights)


def _from_all(logits: Vocabulary, p: Filters, picks: Picks) -> tuple[Tensor, Tensor]:
    """The same, with weights that are computed for it."""
    return _from_vocabulary(logits, logits.weights(p.temperature), p, picks)


def _from_candidates(
    candidates: tuple[Tensor, Tensor], peaks: Tensor, total: Tensor, p: Filters, picks: Picks
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from each row's greatest logits and their tokens [R, W], in order; peaks and `total` [R] of whole rows.

    Also returns the rows that may keep more than these, int64.
    """
    values, tokens = candidates
    candidate_weights, sure = filter_candidates(values, peaks, total, p)
    return *picks.from_candidates(tokens, candidate_weights), (~sure).nonzero()[:, 0]

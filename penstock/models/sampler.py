"""`Sampler`: from a step's logits to its tokens and their log probabilities.

Owns the grouping of rows that are sampled the same way, what is remembered per sequence, and the results. Never runs
the model, never advances a sequence, never touches a global random generator. Called by the executor, once per step.

A row's path depends on its own logits and parameters alone, so that its neighbours never change a bit of its result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from penstock.errors import RequestError
from penstock.models import rules
from penstock.models.cutoffs import cut
from penstock.models.filters import Filters, filter_candidates, filter_vocabulary
from penstock.models.randomness import draw_from_blocks, draw_from_candidates, uniform
from penstock.models.vocabulary import Survey, Top, Vocabulary, Weights, in_order
from penstock.step import Row, RowResult, TokenLogprobs

_MIB = 1024**2
BYTES_PER_LOGIT = 64  # float32 logits and weights; in the worst step of top-p, int64 and float64 of the same
_CPU_CHUNK_LOGITS = _MIB  # about what a processor caches: larger chunks only wait for memory
_NUM_CANDIDATES = 128  # holds most nuclei
_MOST_CANDIDATES = 1024  # from here on, passes over the vocabulary are cheaper


class Way(Enum):
    """How a row's token is found."""

    GREEDY = "greedy"  # the greatest logit
    WHOLE = "whole"  # a draw from the whole vocabulary
    MIN_P = "min_p"  # a draw from what min-p leaves of the vocabulary
    NUCLEUS = "nucleus"  # a draw from the top-p of the vocabulary
    TOP_K = "top_k"  # a draw from the top-k, and the top-p of that
    CUT = "cut"  # a draw from what further restrictions leave of any of these


@dataclass(frozen=True, slots=True)
class Group:
    """What rows that are computed together have in common.

    `plain`: no rules and temperature 1, so that the model's own probabilities serve. `width`: how many candidates to
    look at first, 0 for none.
    """

    way: Way
    ruled: bool
    plain: bool
    width: int


_PLAIN_GREEDY = Group(Way.GREEDY, False, False, 0)


@dataclass(frozen=True, slots=True)
class Choice:
    """Per row: the token int64, its sampled log probability float64, and whether there was a choice at all, bool."""

    token: Tensor
    sampled: Tensor
    possible: Tensor

    @classmethod
    def none(cls, num_rows: int, device: torch.device) -> Choice:
        """Room for the choices of `num_rows` rows."""
        token = torch.zeros(num_rows, dtype=torch.int64, device=device)
        return cls(token, torch.zeros_like(token, dtype=torch.float64), torch.zeros_like(token, dtype=torch.bool))

    def put(self, rows: Tensor, chosen: Choice) -> None:
        """Write the choices of some rows."""
        self.token[rows] = chosen.token
        self.sampled[rows] = chosen.sampled
        self.possible[rows] = chosen.possible


class Sampler:
    """Draws tokens, each row by its own parameters.

    `vocab_size` is about how many logits a row has; `chunk_bytes` bounds the temporary tensors over the vocabulary.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], chunk_bytes: int = 256 * _MIB,
        survey: Survey | None = None,
    ) -> None:  # fmt: skip
        self._eos_token_ids = eos_token_ids
        self._chunk_logits = max(vocab_size, chunk_bytes // BYTES_PER_LOGIT)
        self._survey = survey
        self._sequences: dict[int, rules.SequenceRules] = {}

    @torch.no_grad()
    def sample(self, logits: Tensor, rows: Sequence[Row]) -> list[RowResult]:
        """Draw the next token of each row.

        logits [R, V] of any float dtype, on any device: those after the last position of each row. Results come in
        order. A row whose processor fails, whose rules leave no token (both `RequestError`) or whose logits are not
        numbers (`ExecutionError`) carries its error and hurts nobody else.
        """
        assert len(logits) == len(rows)
        results: list[RowResult] = []
        whole = self._survey is not None and all(_group(row, logits.shape[1]) == _PLAIN_GREEDY for row in rows)
        for chunk in self._chunks(logits, whole):
            if whole and all(row.params.logprobs is None for row in rows[chunk]):
                results += _greatest(Vocabulary.of(logits[chunk], self._survey))
            else:
                results += self._sample_chunk(logits[chunk], rows[chunk])
        return results

    @torch.no_grad()
    def prompt_logprobs(self, logits: Tensor, row: Row) -> RowResult:
        """Score the prompt tokens at positions start + 1 to min(end, prompt_len - 1), under the model itself.

        logits [end - start, V], of every position of the row. `sampled` repeats `logprob`: nothing was sampled.
        Logits that are not numbers are the row's error.
        """
        num_scored = max(0, min(row.end, row.prompt_len - 1) - row.start)
        ids = list(row.tokens[row.start + 1 : row.start + 1 + num_scored])
        tokens = torch.tensor(ids, dtype=torch.int64, device=logits.device)
        scored: list[TokenLogprobs] = []
        logits = logits[:num_scored]
        for chunk in self._chunks(logits):
            raw = Vocabulary.of(logits[chunk], self._survey)
            scored += _score(raw, tokens[chunk], row.params.prompt_logprobs or 0)
        if any(math.isnan(entry.logprob) for entry in scored):
            return RowResult(error=rules.row_error(False, None, True))
        return RowResult(prompt_logprobs=tuple(scored))

    def forget(self, seq_id: int) -> None:
        """Drop what is remembered of a sequence, if anything."""
        self._sequences.pop(seq_id, None)

    def _chunks(self, logits: Tensor, whole: bool = False) -> Iterable[slice]:
        """Few rows at a time; as many as memory allows if nothing but the survey goes through the `whole` of them."""
        cached = logits.device.type == "cpu" and not whole
        most = min(self._chunk_logits, _CPU_CHUNK_LOGITS) if cached else self._chunk_logits
        size = max(1, most // logits.shape[1])
        return (slice(first, first + size) for first in range(0, len(logits), size))

    def _sample_chunk(self, logits: Tensor, rows: Sequence[Row]) -> list[RowResult]:
        raw = Vocabulary.of(logits, self._survey)
        groups = _grouped(rows, raw.size)
        weights = raw.weights() if any(group.plain for group in groups) else None
        choice = Choice.none(len(rows), logits.device)
        errors: dict[int, RequestError] = {}
        for group, members in groups.items():
            index = torch.tensor(members, dtype=torch.int64, device=logits.device)
            some = [rows[i] for i in members]
            seen = raw if len(members) == len(rows) else raw.take(index)
            if group.ruled:
                seen, failed = self._apply_rules(raw.take(index), some)
                errors |= {members[i]: error for i, error in failed.items()}
            own = _weights_of(weights, index, len(rows)) if group.plain and weights is not None else None
            choice.put(index, _choose(group, seen, own, some))
        return _results(raw, raw.log_total(weights), choice, rows, errors)

    def _apply_rules(self, copy: Vocabulary, rows: Sequence[Row]) -> tuple[Vocabulary, dict[int, RequestError]]:
        sequences = [self._sequence(row, copy.size) for row in rows]
        errors = rules.apply(copy.flat[:, : copy.size], rows, sequences)
        return copy.refreshed(), errors

    def _sequence(self, row: Row, size: int) -> rules.SequenceRules:
        known = self._sequences.get(row.seq_id)
        if known is None or not known.continues(row):
            known = self._sequences[row.seq_id] = rules.SequenceRules.of(row, self._eos_token_ids, size)
        return known


def _grouped(rows: Sequence[Row], size: int) -> dict[Group, list[int]]:
    groups: dict[Group, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[_group(row, size)].append(i)
    return groups


def _group(row: Row, size: int) -> Group:
    p = row.params
    ruled = rules.has_rules(row)
    if p.greedy:
        return Group(Way.GREEDY, ruled, False, 0)
    if p.is_cut:
        return Group(Way.CUT, ruled, False, 0)
    if p.top_k:
        return Group(Way.TOP_K, ruled, False, _width(p.top_k, size))
    plain = not ruled and p.temperature == 1
    if p.top_p < 1:
        return Group(Way.NUCLEUS, ruled, plain, _width(0, size))
    return Group(Way.MIN_P if p.min_p else Way.WHOLE, ruled, plain, 0)


def _width(top_k: int, size: int) -> int:
    """Room for the top-k and for ties with its last one, in powers of 2 so that groups stay few."""
    if size <= _MOST_CANDIDATES:
        return size
    width = max(_NUM_CANDIDATES, 1 << (top_k + top_k // 2).bit_length())
    return width if width <= _MOST_CANDIDATES else 0


def _weights_of(weights: Weights, index: Tensor, num_rows: int) -> Weights:
    return weights if len(index) == num_rows else weights.take(index)


def _choose(group: Group, seen: Vocabulary, weights: Weights | None, rows: Sequence[Row]) -> Choice:
    """Choose by logits after every rule; `weights` are theirs, where they are known already."""
    possible = seen.peak.isfinite()
    if group.way is Way.GREEDY:
        return Choice(seen.argmax(), torch.zeros_like(seen.peak, dtype=torch.float64), possible)
    p, uniforms = _parameters(rows, seen.peak.device)
    if weights is None and (group.way is not Way.TOP_K or not group.width):
        weights = seen.weights(p.temperature)
    if group.width:
        token, mass = _draw_from_few(seen, weights, p, uniforms, group.width)
    else:
        assert weights is not None
        if group.way is Way.CUT:
            weights = Weights.of(cut(seen.flat, weights.values.flatten(1), p, rows).view_as(weights.values))
        token, mass = _draw_from_all(seen, weights, None if group.way in (Way.WHOLE, Way.CUT) else p, uniforms)
    scaled = (seen.at(token).double() - seen.peak.double()) / p.temperature
    return Choice(token, scaled - mass.log(), possible)


def _parameters(rows: Sequence[Row], device: torch.device) -> tuple[Filters, Tensor]:
    values = [
        (p.temperature, p.top_k, p.top_p, p.min_p, uniform(row.seed, row.sample_index, row.end))
        for row in rows
        for p in (row.params,)
    ]
    temperature, top_k, top_p, min_p, uniforms = torch.tensor(values, dtype=torch.float64, device="cpu").T.to(device)
    temperature = temperature.clamp(rules.FLOAT_TINY, rules.FLOAT_MAX)  # what divides logits is a float32
    return Filters(temperature, top_k.long(), top_p, min_p), uniforms


def _draw_from_all(seen: Vocabulary, weights: Weights, p: Filters | None, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from the whole vocabulary: tokens [R], and the mass [R] of all that could have been drawn."""
    if p is not None:
        kept = filter_vocabulary(seen.flat, weights.values.flatten(1), p)
        weights = Weights.of(kept.view_as(weights.values))
    return draw_from_blocks(weights.values, weights.cumulative, uniforms), weights.total


def _draw_from_few(
    seen: Vocabulary, weights: Weights | None, p: Filters, uniforms: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The same from the `width` greatest logits, where nothing else is kept, and from the vocabulary elsewhere."""
    logits, tokens = in_order(*seen.candidates(width))
    total = torch.ones_like(uniforms) if weights is None else weights.total
    kept, sure = filter_candidates(logits, seen.peak, total, p)
    token, mass = draw_from_candidates(tokens, kept, uniforms)
    rest = (~sure).nonzero()[:, 0]
    if width < seen.size and len(rest):
        wide, p = seen.take(rest), p.take(rest)
        token[rest], mass[rest] = _draw_from_all(wide, wide.weights(p.temperature), p, uniforms[rest])
    return token, mass


def _results(
    raw: Vocabulary, log_total: Tensor, choice: Choice, rows: Sequence[Row], errors: dict[int, RequestError]
) -> list[RowResult]:
    """Put each row's token, log probabilities or error together: one transfer for all rows."""
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    rank, tops = _details(raw, log_total, choice.token, asked, [rows[i].params.logprobs or 0 for i in asked])
    logprob = raw.at(choice.token).double() - log_total
    columns = (choice.token, logprob, choice.sampled, rank, log_total.isfinite(), choice.possible)
    table = torch.stack([column.double() for column in columns], dim=1).tolist()
    results = []
    for i, (token, own, sampled, place, sane, possible) in enumerate(table):
        error = rules.row_error(bool(sane), errors.get(i), bool(possible))
        if error is not None:
            results.append(RowResult(error=error))
            continue
        entry = TokenLogprobs(int(token), own, sampled, int(place), tops.get(i, ()))
        results.append(RowResult(tokens=(entry.token,), logprobs=(entry,)))
    return results


def _greatest(raw: Vocabulary) -> list[RowResult]:
    """What `_results` says of rows that take their greatest logit and ask for nothing else, with less ado."""
    log_total = raw.log_total()
    columns = zip(raw.argmax().tolist(), (raw.peak.double() - log_total).tolist(), strict=True)
    return [
        RowResult(tokens=(token,), logprobs=(TokenLogprobs(token, logprob, 0.0),))
        if math.isfinite(logprob)
        else RowResult(error=rules.row_error(False, None, True))
        for token, logprob in columns
    ]


def _details(
    raw: Vocabulary, log_total: Tensor, tokens: Tensor, asked: list[int], counts: list[int]
) -> tuple[Tensor, dict[int, Top]]:
    """Ranks int64 [R] of `tokens` (0 where not asked), and the most likely tokens of the rows `asked`."""
    rank = torch.zeros_like(tokens)
    if not asked:
        return rank, {}
    index = torch.tensor(asked, dtype=torch.int64, device=tokens.device)
    some = raw if len(asked) == len(tokens) else raw.take(index)
    rank[index] = some.num_above(some.at(tokens[index])) + 1
    return rank, dict(zip(asked, some.tops(log_total[index], counts), strict=True))


def _score(raw: Vocabulary, tokens: Tensor, count: int) -> list[TokenLogprobs]:
    """What the model thinks of one token [R] per row."""
    log_total = raw.log_total()
    every = list(range(len(tokens)))
    rank, tops = _details(raw, log_total, tokens, every, [count] * len(every))
    logprob = (raw.at(tokens).double() - log_total).tolist()
    columns = zip(tokens.tolist(), logprob, rank.tolist(), every, strict=True)
    return [TokenLogprobs(token, own, own, place, tops[i]) for token, own, place, i in columns]

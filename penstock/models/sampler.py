"""`Sampler`: from a step's logits to its tokens and their log probabilities.

Owns how rows are grouped for sampling, the state of each sequence's rules, and the results. Never runs the model, never
advances a sequence, never touches a global random generator. Called by the executor, once per step.

How a row is computed depends on its own logits and parameters alone, so that its neighbours never change a bit of its
result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from penstock.constraints.masks import Masks
from penstock.errors import RequestError
from penstock.models import rules
from penstock.models.filters import Filters, apply_all_filters, filter_candidates, filter_vocabulary
from penstock.models.masking import mask_errors, mask_rows, rule_out
from penstock.models.randomness import draw_from_candidates, draw_from_chunks, uniform
from penstock.models.vocabulary import CHUNK, AllowedArgmax, LogitSummarizer, Top, Vocabulary, Weights, in_order
from penstock.step import Row, RowResult, TokenLogprobs

_MIB = 1024**2
BYTES_PER_LOGIT = 64  # float32 logits and weights; in the worst step of top-p, int64 and float64 of the same
_CPU_BATCH_LOGITS = _MIB  # about what a processor caches: larger batches only wait for memory
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


_PLAIN_GREEDY = Group(Method.GREEDY, False, False, 0)
_MASKED_GREEDY = Group(Method.GREEDY, False, False, 0, True)


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

    def put(self, rows: Tensor, choice: Choice) -> None:
        """Write the choices of some rows."""
        self.token[rows] = choice.token
        self.sampled[rows] = choice.sampled
        self.possible[rows] = choice.possible


class Sampler:
    """Draws tokens, each row by its own parameters.

    `vocab_size` is about how many logits a row has; `chunk_bytes` bounds the temporary tensors over the vocabulary.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], chunk_bytes: int = 256 * _MIB,
        summarize: LogitSummarizer | None = None, argmax_allowed: AllowedArgmax | None = None,
    ) -> None:  # fmt: skip
        self._eos_token_ids = eos_token_ids
        self._max_batch_logits = max(vocab_size, chunk_bytes // BYTES_PER_LOGIT)
        self._summarize = summarize
        self._argmax_allowed = argmax_allowed
        self._one_pass_groups = (_PLAIN_GREEDY,) if argmax_allowed is None else (_PLAIN_GREEDY, _MASKED_GREEDY)
        self._sequences: dict[int, rules.SequenceRules] = {}

    @torch.no_grad()
    def sample(self, logits: Tensor, rows: Sequence[Row], masks: Masks | None = None) -> list[RowResult]:
        """Draw the next token of each row.

        logits [R, V] of any float dtype, on any device: those after the last position of each row. Results come in
        order. `masks` are those of the rows with a constraint. A row whose processor fails, whose rules leave no token
        (both `RequestError`), whose constraint failed (`GrammarError`) or whose logits are not finite
        (`ExecutionError`) carries its error and affects no other row.
        """
        assert len(logits) == len(rows)
        groups = [_group_of(row, logits.shape[1]) for row in rows]
        one_pass = self._summarize is not None and all(group in self._one_pass_groups for group in groups)
        results: list[RowResult] = []
        for batch in self._batches(logits, one_pass=one_pass):
            if one_pass and all(row.params.logprobs is None for row in rows[batch]):
                results += self._sample_greedily(logits[batch], rows[batch], masks)
            else:
                results += self._sample_batch(logits[batch], rows[batch], groups[batch], masks)
        return results

    @torch.no_grad()
    def prompt_logprobs(self, logits: Tensor, row: Row) -> RowResult:
        """Score the prompt tokens at positions start + 1 to min(end, prompt_len - 1), under the model itself.

        logits [end - start, V], of every position of the row. `sampled` repeats `logprob`: nothing was sampled.
        Logits that are not finite are the row's error.
        """
        num_scored = max(0, min(row.end, row.prompt_len - 1) - row.start)
        ids = list(row.tokens[row.start + 1 : row.start + 1 + num_scored])
        tokens = torch.tensor(ids, dtype=torch.int64, device=logits.device)
        scores: list[TokenLogprobs] = []
        logits = logits[:num_scored]
        for batch in self._batches(logits):
            raw = Vocabulary.of(logits[batch], self._summarize)
            scores += _score(raw, tokens[batch], row.params.prompt_logprobs or 0)
        if any(math.isnan(score.logprob) for score in scores):
            return RowResult(error=rules.row_error(False, None, True))
        return RowResult(prompt_logprobs=tuple(scores))

    def forget(self, seq_id: int) -> None:
        """Drop the state of a sequence, if there is any."""
        self._sequences.pop(seq_id, None)

    def _batches(self, logits: Tensor, *, one_pass: bool = False) -> Iterable[slice]:
        """Slices of rows that are sampled together.

        On a CPU a batch is small, so that it stays in the cache from one pass over its logits to the next; where the
        kernel that summarizes logits makes the only pass (`one_pass`), memory alone limits its size.
        """
        cached = logits.device.type == "cpu" and not one_pass
        num_logits = min(self._max_batch_logits, _CPU_BATCH_LOGITS) if cached else self._max_batch_logits
        size = max(1, num_logits // logits.shape[1])
        return [slice(begin, begin + size) for begin in range(0, len(logits), size)]

    def _sample_batch(
        self, logits: Tensor, rows: Sequence[Row], groups: Sequence[Group], masks: Masks | None
    ) -> list[RowResult]:
        raw = Vocabulary.of(logits, self._summarize)
        members_of: dict[Group, list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            members_of[group].append(i)
        weights = raw.weights() if any(group.plain for group in members_of) else None
        choice = Choice.empty(len(rows), logits.device)
        errors: dict[int, RequestError] = {}
        for group, members in members_of.items():
            index = torch.tensor(members, dtype=torch.int64, device=logits.device)
            member_rows = [rows[i] for i in members]
            is_all = len(members) == len(rows)
            ruled = raw if is_all else raw.take(index)
            if group.ruled or group.masked:
                ruled, member_errors = self._apply_rules(raw.take(index), member_rows, group, masks)
                errors |= {members[i]: error for i, error in member_errors.items()}
            plain_weights = None
            if group.plain and weights is not None:
                plain_weights = weights if is_all else weights.take(index)
            choice.put(index, _choose(group, ruled, plain_weights, member_rows))
        return _results(raw, raw.log_total(weights), choice, rows, errors)

    def _apply_rules(
        self, copy: Vocabulary, rows: Sequence[Row], group: Group, masks: Masks | None
    ) -> tuple[Vocabulary, dict[int, RequestError]]:
        errors: dict[int, RequestError] = {}
        if group.ruled:
            sequences = [self._sequence(row, copy.size) for row in rows]
            errors = rules.apply(copy.flat[:, : copy.size], rows, sequences)
        if masks is not None and group.masked:
            rule_out(copy.flat, rows, masks)
            errors |= mask_errors(rows, masks)
        return copy.refreshed(is_masked=group.masked), errors

    def _sample_greedily(self, logits: Tensor, rows: Sequence[Row], masks: Masks | None) -> list[RowResult]:
        """The results of rows that take their greatest logit, of those allowed, and request nothing else."""
        raw = Vocabulary.of(logits, self._summarize)
        if masks is None:
            return _greedy_results(raw, raw.peak, raw.argmax(), {})
        assert self._argmax_allowed is not None
        allowed = self._argmax_allowed(raw.flat, raw.chunk_peaks, mask_rows(rows, masks), CHUNK)
        return _greedy_results(raw, *allowed, mask_errors(rows, masks))

    def _sequence(self, row: Row, size: int) -> rules.SequenceRules:
        sequence = self._sequences.get(row.seq_id)
        if sequence is None or not sequence.continues(row):
            sequence = self._sequences[row.seq_id] = rules.SequenceRules.of(row, self._eos_token_ids, size)
        return sequence


def _group_of(row: Row, size: int) -> Group:
    p = row.params
    ruled, masked = rules.has_rules(row), row.constraint is not None
    if p.greedy:
        return Group(Method.GREEDY, True, False, 0, masked) if ruled else _MASKED_GREEDY if masked else _PLAIN_GREEDY
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


def _choose(group: Group, ruled: Vocabulary, weights: Weights | None, rows: Sequence[Row]) -> Choice:
    """Choose by the logits after every rule; `weights` are those of `ruled`, where they exist already."""
    possible = ruled.peak.isfinite()
    if group.method is Method.GREEDY:
        return Choice(ruled.argmax(), torch.zeros_like(ruled.peak, dtype=torch.float64), possible)
    p, uniforms = _parameters(rows, ruled.peak.device)
    if weights is None and (group.method is not Method.TOP_K or not group.width):
        weights = ruled.weights(p.temperature)
    if group.width:
        token, mass = _draw_from_candidates(ruled, weights, p, uniforms, group.width)
    else:
        assert weights is not None
        if group.method is Method.ALL_FILTERS:
            values = apply_all_filters(ruled.flat, weights.values.flatten(1), p, rows)
            weights = Weights.of(values.view_as(weights.values))
        filters = None if group.method in (Method.FULL, Method.ALL_FILTERS) else p
        token, mass = _draw_from_vocabulary(ruled, weights, filters, uniforms)
    scaled = (ruled.at(token).double() - ruled.peak.double()) / p.temperature
    return Choice(token, scaled - mass.log(), possible)


def _parameters(rows: Sequence[Row], device: torch.device) -> tuple[Filters, Tensor]:
    values = [
        (p.temperature, p.top_k, p.top_p, p.min_p, uniform(row.seed, row.sample_index, row.end))
        for row in rows
        for p in (row.params,)
    ]
    temperature, top_k, top_p, min_p, uniforms = torch.tensor(values, dtype=torch.float64, device="cpu").T.to(device)
    temperature = temperature.clamp(rules.FLOAT_TINY, rules.FLOAT_MAX)  # logits are divided by it in float32
    return Filters(temperature, top_k.long(), top_p, min_p), uniforms


def _draw_from_vocabulary(
    logits: Vocabulary, weights: Weights, p: Filters | None, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from the whole vocabulary: tokens [R], and the mass [R] of all that could have been drawn."""
    if p is not None:
        values = filter_vocabulary(logits.flat, weights.values.flatten(1), p)
        weights = Weights.of(values.view_as(weights.values))
    return draw_from_chunks(weights.values, weights.cumulative, uniforms), weights.total


def _draw_from_candidates(
    logits: Vocabulary, weights: Weights | None, p: Filters, uniforms: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The same from the `width` greatest logits; from the vocabulary for rows that may keep more than these."""
    values, tokens = in_order(*logits.candidates(width))
    total = torch.ones_like(uniforms) if weights is None else weights.total
    candidate_weights, sure = filter_candidates(values, logits.peak, total, p)
    token, mass = draw_from_candidates(tokens, candidate_weights, uniforms)
    unsure = (~sure).nonzero()[:, 0]
    if width < logits.size and len(unsure):
        unsure_logits, p = logits.take(unsure), p.take(unsure)
        unsure_weights = unsure_logits.weights(p.temperature)
        token[unsure], mass[unsure] = _draw_from_vocabulary(unsure_logits, unsure_weights, p, uniforms[unsure])
    return token, mass


def _results(
    raw: Vocabulary, log_total: Tensor, choice: Choice, rows: Sequence[Row], errors: Mapping[int, RequestError]
) -> list[RowResult]:
    """Each row's token and log probabilities, or its error: one transfer from the device for all rows."""
    with_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    counts = [rows[i].params.logprobs or 0 for i in with_logprobs]
    ranks, tops = _ranks_and_tops(raw, log_total, choice.token, with_logprobs, counts)
    logprobs = raw.at(choice.token).double() - log_total
    columns = (choice.token, logprobs, choice.sampled, ranks, log_total.isfinite(), choice.possible)
    table = torch.stack([column.double() for column in columns], dim=1).tolist()
    results = []
    for i, (token, logprob, sampled, rank, finite, possible) in enumerate(table):
        error = rules.row_error(bool(finite), errors.get(i), bool(possible))
        if error is not None:
            results.append(RowResult(error=error))
            continue
        entry = TokenLogprobs(int(token), logprob, sampled, int(rank), tops.get(i, ()))
        results.append(RowResult(tokens=(entry.token,), logprobs=(entry,)))
    return results


def _greedy_results(
    raw: Vocabulary, peaks: Tensor, tokens: Tensor, errors: Mapping[int, RequestError]
) -> list[RowResult]:
    """The results of `_results` for tokens [R] with the greatest logits [R] that may follow, in fewer steps."""
    log_total = raw.log_total()
    logprobs = (peaks.double() - log_total).tolist()
    results = [
        RowResult(tokens=(token,), logprobs=(TokenLogprobs(token, logprob, 0.0),))
        for token, logprob in zip(tokens.tolist(), logprobs, strict=True)
    ]
    for i, logprob in enumerate(logprobs):
        if i in errors or not math.isfinite(logprob):
            finite, possible = math.isfinite(log_total[i]), bool(peaks[i].isfinite())
            results[i] = RowResult(error=rules.row_error(finite, errors.get(i), possible))
    return results


def _ranks_and_tops(
    raw: Vocabulary, log_total: Tensor, tokens: Tensor, indices: list[int], counts: list[int]
) -> tuple[Tensor, dict[int, Top]]:
    """Ranks int64 [R] of `tokens` and the `counts[i]` most likely tokens, of the rows `indices` only (else rank 0)."""
    ranks = torch.zeros_like(tokens)
    if not indices:
        return ranks, {}
    index = torch.tensor(indices, dtype=torch.int64, device=tokens.device)
    selected = raw if len(indices) == len(tokens) else raw.take(index)
    ranks[index] = selected.num_above(selected.at(tokens[index])) + 1
    return ranks, dict(zip(indices, selected.tops(log_total[index], counts), strict=True))


def _score(raw: Vocabulary, tokens: Tensor, count: int) -> list[TokenLogprobs]:
    """The model's log probabilities of one token [R] per row, with the `count` most likely tokens."""
    log_total = raw.log_total()
    indices = list(range(len(tokens)))
    ranks, tops = _ranks_and_tops(raw, log_total, tokens, indices, [count] * len(indices))
    logprobs = (raw.at(tokens).double() - log_total).tolist()
    columns = zip(tokens.tolist(), logprobs, ranks.tolist(), indices, strict=True)
    return [TokenLogprobs(token, logprob, logprob, rank, tops[i]) for token, logprob, rank, i in columns]

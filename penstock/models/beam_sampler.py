"""`BeamSampler`: the likeliest next tokens of each beam of a beam search, in place of one draw.

Owns how a request's rules meet log probabilities: as in `transformers`, they are applied to those, not to logits, so
that what they take from one token is not spread over the vocabulary. Keeps nothing between steps, since a beam's tokens
change. Called by the executor, once per step with beams.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from penstock.errors import RequestError
from penstock.kernels.logits import LogitKernels
from penstock.models import rules
from penstock.models.sampler import BYTES_PER_LOGIT
from penstock.models.vocabulary import Top, Vocabulary
from penstock.optimizers.beam_search import num_candidates
from penstock.step import Row, RowResult, TokenLogprobs

_MARGIN = 8  # candidates beyond those requested, so that ties at the edge are complete


class BeamSampler:
    """`chunk_bytes` bounds the temporary tensors over the vocabulary."""

    def __init__(self, eos_token_ids: frozenset[int], chunk_bytes: int, kernels: LogitKernels | None = None) -> None:
        self._eos_token_ids = eos_token_ids
        self._chunk_bytes = chunk_bytes
        self._kernels = kernels

    @torch.no_grad()
    def candidates(self, logits: Tensor, rows: Sequence[Row]) -> list[RowResult]:
        """Each row's `candidates`: logits [R, V] are those after its last position. Errors are as the sampler's."""
        assert len(logits) == len(rows)
        results: dict[int, RowResult] = {}
        for ruled in (False, True):  # apart, so that a row never depends on its neighbours' rules
            members = [i for i, row in enumerate(rows) if rules.has_rules(row) == ruled]
            for batch in self._batches(members, logits.shape[1]):
                raw = logits if len(batch) == len(logits) else logits[_int64(batch, logits.device)]
                vocabulary = Vocabulary.of(raw, self._kernels)
                results |= zip(batch, self._sample(vocabulary, [rows[i] for i in batch], ruled), strict=True)
        return [results[i] for i in range(len(rows))]

    def _batches(self, members: list[int], vocab_size: int) -> Iterable[list[int]]:
        size = max(1, self._chunk_bytes // (BYTES_PER_LOGIT * vocab_size))
        return (members[begin : begin + size] for begin in range(0, len(members), size))

    def _sample(self, raw: Vocabulary, rows: Sequence[Row], ruled: bool) -> list[RowResult]:
        log_total = raw.log_total()
        scored, errors = self._apply_rules(raw, log_total, rows) if ruled else (raw, {})
        counts = [num_candidates(row.params.num_beams, len(row.stop_ids)) for row in rows]
        scores, tokens = _greatest(scored, min(max(counts), raw.size))
        logits = raw.flat.gather(1, _int64(tokens, raw.peak.device)).tolist() if ruled else scores
        details = _Details.of(raw, log_total, tokens, rows)
        results = []
        for i, (total, peak) in enumerate(zip(log_total.tolist(), scored.peak.tolist(), strict=True)):
            logprobs = [logit - total for logit in logits[i][: counts[i]]]
            entries = details.entries(i, tokens[i], logprobs, scores[i] if ruled else logprobs)
            error = rules.row_error(isfinite(total), errors.get(i), isfinite(peak))
            results.append(RowResult(candidates=entries) if error is None else RowResult(error=error))
        return results

    def _apply_rules(
        self, raw: Vocabulary, log_total: Tensor, rows: Sequence[Row]
    ) -> tuple[Vocabulary, dict[int, RequestError]]:
        """Log probabilities after every rule, and the errors of user processors."""
        copy = raw.take(torch.arange(len(rows), dtype=torch.int64, device=log_total.device))
        copy.flat.sub_(log_total[:, None])
        sequences = [rules.SequenceRules.of(row, self._eos_token_ids, raw.size) for row in rows]
        errors = rules.apply(copy.flat[:, : raw.size], rows, sequences)
        _renormalize(copy.flat, rows)
        return copy.refreshed(), errors


def _renormalize(logprobs: Tensor, rows: Sequence[Row]) -> None:
    members = [i for i, row in enumerate(rows) if row.params.renormalize_logits]
    if members:
        index = _int64(members, logprobs.device)
        logprobs[index] = logprobs[index].log_softmax(-1)


def _greatest(scores: Vocabulary, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """`Vocabulary.greatest` as lists: so few numbers are sorted faster here than by a dozen operations on tensors."""
    width = min(scores.size, count + _MARGIN)
    columns = zip(*(column.tolist() for column in scores.candidates(width)), strict=True)
    rows = [sorted(zip(values, tokens, strict=True), key=_best_first) for values, tokens in columns]
    if width < scores.size and any(row[-1][0] == row[count - 1][0] for row in rows):  # a tie that may be incomplete
        values, tokens = scores.greatest(count)
        return values.tolist(), tokens.tolist()
    return [[value for value, _ in row[:count]] for row in rows], [[token for _, token in row[:count]] for row in rows]


def _best_first(candidate: tuple[float, int]) -> tuple[float, int]:
    return -candidate[0], candidate[1]


def _int64(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


@dataclass(frozen=True, slots=True)
class _Details:
    """For rows with logprobs, by row: ranks [W] of the candidates, and the most likely tokens."""

    ranks: dict[int, list[int]]
    tops: dict[int, Top]

    @classmethod
    def of(cls, raw: Vocabulary, log_total: Tensor, tokens: list[list[int]], rows: Sequence[Row]) -> _Details:
        with_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if not with_logprobs:
            return cls({}, {})
        index = _int64(with_logprobs, raw.peak.device)
        selected, candidates = raw.take(index), _int64([tokens[i] for i in with_logprobs], raw.peak.device)
        above = [selected.num_above(selected.at(column)) for column in candidates.T]
        ranks = (torch.stack(above, dim=1) + 1).tolist()
        tops = selected.tops(log_total[index], [rows[i].params.logprobs or 0 for i in with_logprobs])
        return cls(dict(zip(with_logprobs, ranks, strict=True)), dict(zip(with_logprobs, tops, strict=True)))

    def entries(
        self, i: int, tokens: list[int], logprobs: list[float], scores: list[float]
    ) -> tuple[TokenLogprobs, ...]:
        """The candidates of row i, without those that are ruled out."""
        ranks, top = self.ranks.get(i, [0] * len(tokens)), self.tops.get(i, ())
        columns = zip(tokens, logprobs, scores, ranks, strict=False)  # as many as there are logprobs
        return tuple(
            TokenLogprobs(token, logprob, score, rank, top) for token, logprob, score, rank in columns if score > -inf
        )

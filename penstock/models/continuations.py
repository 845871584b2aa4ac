"""`Continuations`: the likeliest next tokens of each beam of a beam search, in place of one draw.

Owns how a request's rules meet log probabilities: as in `transformers`, they are applied to those, not to logits, so
that what they change is not spread over the vocabulary. Keeps nothing between steps, since beams change their tokens.
Called by the executor, once per step with beams.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from penstock.errors import RequestError
from penstock.models import rules
from penstock.models.sampler import BYTES_PER_LOGIT
from penstock.models.vocabulary import Survey, Top, Vocabulary
from penstock.optimizers.beams import num_candidates
from penstock.step import Row, RowResult, TokenLogprobs

_MARGIN = 8  # candidates beyond those wanted, since ties at the edge need all of them


class Continuations:
    """`chunk_bytes` bounds the temporary tensors over the vocabulary."""

    def __init__(self, eos_token_ids: frozenset[int], chunk_bytes: int, survey: Survey | None = None) -> None:
        self._eos_token_ids = eos_token_ids
        self._chunk_bytes = chunk_bytes
        self._survey = survey

    @torch.no_grad()
    def find(self, logits: Tensor, rows: Sequence[Row]) -> list[RowResult]:
        """Each row's `candidates`: logits [R, V] are those after its last position. Errors are as the sampler's."""
        assert len(logits) == len(rows)
        found: dict[int, RowResult] = {}
        for ruled in (False, True):  # apart, so that a row never depends on its neighbours' rules
            members = [i for i, row in enumerate(rows) if rules.has_rules(row) == ruled]
            for some in self._chunks(members, logits.shape[1]):
                chosen = (
                    logits
                    if len(some) == len(logits)
                    else logits[torch.tensor(some, dtype=torch.int64, device=logits.device)]
                )
                raw = Vocabulary.of(chosen, self._survey)
                found |= zip(some, self._find(raw, [rows[i] for i in some], ruled), strict=True)
        return [found[i] for i in range(len(rows))]

    def _chunks(self, members: list[int], vocab_size: int) -> Iterable[list[int]]:
        size = max(1, self._chunk_bytes // (BYTES_PER_LOGIT * vocab_size))
        return (members[first : first + size] for first in range(0, len(members), size))

    def _find(self, raw: Vocabulary, rows: Sequence[Row], ruled: bool) -> list[RowResult]:
        log_total = raw.log_total()
        seen, errors = self._ruled(raw, log_total, rows) if ruled else (raw, {})
        counts = [num_candidates(row.params.num_beams, len(row.stop_ids)) for row in rows]
        values, tokens = _greatest(seen, min(max(counts), raw.size))
        own = raw.flat.gather(1, _indices(tokens, raw)).tolist() if ruled else values
        details = _Details.of(raw, log_total, tokens, rows)
        results = []
        for i, (total, peak) in enumerate(zip(log_total.tolist(), seen.peak.tolist(), strict=True)):
            logprobs = [logit - total for logit in own[i][: counts[i]]]
            entries = details.entries(i, tokens[i], logprobs, values[i] if ruled else logprobs)
            error = rules.row_error(isfinite(total), errors.get(i), isfinite(peak))
            results.append(RowResult(candidates=entries) if error is None else RowResult(error=error))
        return results

    def _ruled(
        self, raw: Vocabulary, log_total: Tensor, rows: Sequence[Row]
    ) -> tuple[Vocabulary, dict[int, RequestError]]:
        """Log probabilities after every rule, and the errors of user processors."""
        copy = raw.take(torch.arange(len(rows), dtype=torch.int64, device=log_total.device))
        copy.flat.sub_(log_total[:, None])
        sequences = [rules.SequenceRules.of(row, self._eos_token_ids, raw.size) for row in rows]
        errors = rules.apply(copy.flat[:, : raw.size], rows, sequences)
        _renormalize(copy.flat, rows)
        return copy.refreshed(), errors


def _renormalize(logits: Tensor, rows: Sequence[Row]) -> None:
    members = [i for i, row in enumerate(rows) if row.params.renormalize_logits]
    if members:
        index = torch.tensor(members, dtype=torch.int64, device=logits.device)
        logits[index] = logits[index].log_softmax(-1)


def _greatest(seen: Vocabulary, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """`Vocabulary.greatest` as lists. So few are sorted here sooner than by a dozen operations on tensors."""
    width = min(seen.size, count + _MARGIN)
    columns = zip(*(found.tolist() for found in seen.candidates(width)), strict=True)
    rows = [sorted(zip(values, tokens, strict=True), key=_best_first) for values, tokens in columns]
    if width < seen.size and any(row[-1][0] == row[count - 1][0] for row in rows):  # a tie that may not be whole
        logits, tokens = seen.greatest(count)
        return logits.tolist(), tokens.tolist()
    return [[value for value, _ in row[:count]] for row in rows], [[token for _, token in row[:count]] for row in rows]


def _indices(values: Sequence[int] | Sequence[Sequence[int]], raw: Vocabulary) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=raw.peak.device)


def _best_first(found: tuple[float, int]) -> tuple[float, int]:
    return -found[0], found[1]


@dataclass(frozen=True, slots=True)
class _Details:
    """What rows that asked for logprobs get with each candidate: ranks [W] of the candidates, and the top tokens."""

    ranks: dict[int, list[int]]
    tops: dict[int, Top]

    @classmethod
    def of(cls, raw: Vocabulary, log_total: Tensor, tokens: list[list[int]], rows: Sequence[Row]) -> _Details:
        asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if not asked:
            return cls({}, {})
        index = _indices(asked, raw)
        some, named = raw.take(index), _indices([tokens[i] for i in asked], raw)
        above = [some.num_above(some.at(column)) for column in named.T]
        ranks = (torch.stack(above, dim=1) + 1).tolist()
        tops = some.tops(log_total[index], [rows[i].params.logprobs or 0 for i in asked])
        return cls(dict(zip(asked, ranks, strict=True)), dict(zip(asked, tops, strict=True)))

    def entries(
        self, i: int, tokens: list[int], logprobs: list[float], scores: list[float]
    ) -> tuple[TokenLogprobs, ...]:
        """The candidates of row i, without those that are ruled out."""
        ranks, top = self.ranks.get(i, [0] * len(tokens)), self.tops.get(i, ())
        columns = zip(tokens, logprobs, scores, ranks, strict=False)  # as many as there are logprobs
        return tuple(TokenLogprobs(token, own, score, rank, top) for token, own, score, rank in columns if score > -inf)

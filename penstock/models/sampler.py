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

import torch
from torch import Tensor

from penstock.constraints.masks import Masks
from penstock.errors import RequestError
from penstock.kernels.logits import LogitKernels
from penstock.models import rules
from penstock.models.choice import MASKED_GREEDY, PLAIN_GREEDY, Choice, Group, choose, choose_in_one_pass, group_of
from penstock.models.masking import greatest_allowed, mask_errors, mask_rows, masked_copy
from penstock.models.vocabulary import Top, Vocabulary, Weights
from penstock.step import Row, RowResult, TokenLogprobs

_MIB = 1024**2
BYTES_PER_LOGIT = 64  # float32 logits and weights; in the worst step of top-p, int64 and float64 of the same
_BYTES_IN_ONE_PASS = 8  # float32 logits, if they have another type, and what belongs to their blocks
_CPU_BATCH_LOGITS = _MIB  # about what a processor caches: larger batches only wait for memory


class Sampler:
    """Draws tokens, each row by its own parameters.

    `vocab_size` is about how many logits a row has; `chunk_bytes` bounds the temporary tensors over the vocabulary.
    Logits on the CPU may have `kernels`; without them all is plain torch.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], chunk_bytes: int = 256 * _MIB,
        kernels: LogitKernels | None = None,
    ) -> None:  # fmt: skip
        self._eos_token_ids = eos_token_ids
        self._max_batch_logits = max(vocab_size, chunk_bytes // BYTES_PER_LOGIT)
        self._kernels = kernels
        self._sequences: dict[int, rules.SequenceRules] = {}

    @torch.no_grad()
    def sample(self, logits: Tensor, rows: Sequence[Row], masks: Masks | None = None) -> list[RowResult]:
        """Draw the next token of each row.

        logits [R, V] of any float dtype, on any device: those after the last position of each row. Results come in
        order. `masks` are those of the rows with a constraint; greedy rows may lack one where there are kernels. A row
        whose processor fails, whose rules leave no token (both `RequestError`), whose constraint failed
        (`GrammarError`) or whose logits are not finite (`ExecutionError`) carries its error and affects no other row.
        """
        assert len(logits) == len(rows)
        groups = [group_of(row, logits.shape[1]) for row in rows]
        one_pass = all(map(self._is_one_pass, groups)) and all(row.params.logprobs is None for row in rows)
        is_greedy = one_pass and all(group in (PLAIN_GREEDY, MASKED_GREEDY) for group in groups)
        results: list[RowResult] = []
        for batch in self.batches(logits, one_pass=one_pass):
            if is_greedy:
                results += self._sample_greedily(logits[batch], rows[batch], masks)
            else:
                results += self._sample_batch(logits[batch], rows[batch], groups[batch], masks)
        return results

    def forget(self, seq_id: int) -> None:
        """Drop the state of a sequence, if there is any."""
        self._sequences.pop(seq_id, None)

    def batches(self, logits: Tensor, *, one_pass: bool = False) -> Iterable[slice]:
        """Slices of rows that are sampled together.

        On a CPU a batch is small, so that it stays in the cache from one pass over its logits to the next; where
        kernels need a pass or two and no copy (`one_pass`), memory alone limits its size.
        """
        num_logits = self._max_batch_logits
        if one_pass:
            num_logits *= BYTES_PER_LOGIT // _BYTES_IN_ONE_PASS
        elif logits.device.type == "cpu":
            num_logits = min(num_logits, _CPU_BATCH_LOGITS)
        size = max(1, num_logits // logits.shape[1])
        return [slice(begin, begin + size) for begin in range(0, len(logits), size)]

    def choose(
        self,
        raw: Vocabulary,
        rows: Sequence[Row],
        groups: Sequence[Group],
        masks: Masks | None = None,
        given: Tensor | None = None,
    ) -> tuple[Choice, Tensor, dict[int, RequestError]]:
        """Choose for one batch, or score the tokens `given` for it, int64 [R], under each row's own parameters.

        Also returns the logs of the sums of exp(logit), float64 [R], and the errors of processors by row.
        """
        members_of: dict[Group, list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            members_of[group].append(i)
        weights = raw.weights() if raw.kernels is None and any(group.plain for group in members_of) else None
        choice = Choice.empty(len(rows), raw.peak.device)
        errors: dict[int, RequestError] = {}
        for group, members in members_of.items():
            index = torch.tensor(members, dtype=torch.int64, device=raw.peak.device)
            member_rows = [rows[i] for i in members]
            if group == MASKED_GREEDY and given is None and raw.kernels is not None:
                allowed = greatest_allowed(raw, members, member_rows, masks)
                chosen, member_errors = Choice.greedy(*allowed[:2]), allowed[2]
            else:
                member_tokens = None if given is None else given[index]
                chosen, member_errors = self._choose_in(group, raw, index, weights, member_rows, masks, member_tokens)
            choice.put(index, chosen)
            errors |= {members[i]: error for i, error in member_errors.items()}
        return choice, raw.log_total(weights), errors

    def _choose_in(
        self, group: Group, raw: Vocabulary, index: Tensor, weights: Weights | None, rows: Sequence[Row],
        masks: Masks | None, tokens: Tensor | None,
    ) -> tuple[Choice, dict[int, RequestError]]:  # fmt: skip
        """The choice of one group, whose rows are `index` in `raw`, and the errors of its rows; see `choose`."""
        is_all, errors = len(index) == len(raw.peak), dict[int, RequestError]()
        ruled, bits = raw, None
        plain_weights = weights if group.plain else None
        if plain_weights is not None and not is_all:
            plain_weights = plain_weights.take(index)
        if group.ruled:
            ruled, errors = self._apply_rules(raw.take(index), rows)
            index, is_all = torch.arange(len(rows), dtype=torch.int64, device=index.device), True
        if masks is not None and group.masked:
            bits = mask_rows(rows, masks)
            errors |= mask_errors(rows, masks)
        if raw.kernels is not None and group.takes_one_pass:
            return choose_in_one_pass(group, ruled, index, bits, rows, tokens), errors
        if bits is not None:
            ruled = masked_copy(ruled, index, bits)
        elif not is_all:
            ruled = ruled.take(index)
        return choose(group, ruled, plain_weights, rows, tokens), errors

    def _sample_batch(
        self, logits: Tensor, rows: Sequence[Row], groups: Sequence[Group], masks: Masks | None
    ) -> list[RowResult]:
        raw = Vocabulary.of(logits, self._kernels)
        choice, log_total, errors = self.choose(raw, rows, groups, masks)
        return _results(raw, log_total, choice, rows, errors)

    def _apply_rules(self, copy: Vocabulary, rows: Sequence[Row]) -> tuple[Vocabulary, dict[int, RequestError]]:
        sequences = [self._sequence(row, copy.size) for row in rows]
        errors = rules.apply(copy.flat[:, : copy.size], rows, sequences)
        return copy.refreshed(), errors

    def _is_one_pass(self, group: Group) -> bool:
        return self._kernels is not None and not group.ruled and group.takes_one_pass

    def _sample_greedily(self, logits: Tensor, rows: Sequence[Row], masks: Masks | None) -> list[RowResult]:
        """The results of rows that take their greatest logit, of those allowed, and request nothing else."""
        raw = Vocabulary.of(logits, self._kernels)
        if all(row.constraint is None for row in rows):
            return _greedy_results(raw, raw.peak, raw.argmax(), {})
        return _greedy_results(raw, *greatest_allowed(raw, range(len(rows)), rows, masks))

    def _sequence(self, row: Row, size: int) -> rules.SequenceRules:
        sequence = self._sequences.get(row.seq_id)
        if sequence is None or not sequence.continues(row):
            sequence = self._sequences[row.seq_id] = rules.SequenceRules.of(row, self._eos_token_ids, size)
        return sequence


def _results(
    raw: Vocabulary, log_total: Tensor, choice: Choice, rows: Sequence[Row], errors: Mapping[int, RequestError]
) -> list[RowResult]:
    """Each row's token and log probabilities, or its error: one transfer from the device for all rows."""
    with_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    counts = [rows[i].params.logprobs or 0 for i in with_logprobs]
    ranks, tops = ranks_and_tops(raw, log_total, choice.token, with_logprobs, counts)
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


def ranks_and_tops(
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

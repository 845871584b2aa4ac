"""`RowScorer`: the log probabilities of a row's scored tokens, from the logits in front of them.

Owns the order of a completion's positions and the memory that scoring takes. Draws nothing. Called by the executor for
every row with a scored range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from penstock.errors import RequestError
from penstock.kernels.logits import LogitKernels
from penstock.models import rules
from penstock.models.choice import Choice, group_of
from penstock.models.sampler import Sampler, ranks_and_tops
from penstock.models.vocabulary import Vocabulary
from penstock.scores import FloatArray, Score, ScorePart
from penstock.scoring import ScoringParams
from penstock.step import NO_POSITIONS, Row, RowResult, TokenLogprobs


class RowScorer:
    """Scores rows one after the other, so that neighbours cannot change a bit of their results.

    `vocab_size` is about how many logits a row has; `chunk_bytes` bounds the temporary tensors over the vocabulary.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], chunk_bytes: int,
        kernels: LogitKernels | None = None,
    ) -> None:  # fmt: skip
        self._kernels = kernels
        # Of its own, because the rules of a sampler's sequences follow what they generate.
        self._sampler = Sampler(vocab_size, eos_token_ids, chunk_bytes, kernels)

    @torch.no_grad()
    def score(self, logits: Tensor, row: Row) -> RowResult:
        """Score the tokens at `row.scored` from logits [len(scored), V] of any float dtype, on any device.

        Logits that are not finite, a processor that fails and rules that leave no token are the row's error.
        """
        params = row.params
        if isinstance(params, ScoringParams):
            return self._score(logits, row, params)
        return self._prompt_logprobs(logits, row, params.prompt_logprobs or 0)

    def forget(self, seq_id: int) -> None:
        """Drop the state of a sequence, if there is any."""
        self._sampler.forget(seq_id)

    def _batches(self, logits: Tensor, row: Row) -> Iterator[tuple[slice, Vocabulary, Tensor]]:
        """(place in the scored range, logits, tokens int64 [R]) of what is computed at once."""
        ids = list(row.tokens[row.scored.start : row.scored.stop])
        tokens = torch.tensor(ids, dtype=torch.int64, device=logits.device)
        for batch in self._sampler.batches(logits):
            yield batch, Vocabulary.of(logits[batch], self._kernels), tokens[batch]

    def _prompt_logprobs(self, logits: Tensor, row: Row, count: int) -> RowResult:
        """Entries with ranks and the `count` most likely tokens. `sampled` is `logprob`: nothing was sampled."""
        entries: list[TokenLogprobs] = []
        for _, raw, tokens in self._batches(logits, row):
            log_total, indices = raw.log_total(), list(range(len(tokens)))
            ranks, tops = ranks_and_tops(raw, log_total, tokens, indices, [count] * len(indices))
            logprobs = (raw.at(tokens).double() - log_total).tolist()
            columns = zip(tokens.tolist(), logprobs, ranks.tolist(), indices, strict=True)
            entries += [TokenLogprobs(token, logprob, logprob, rank, tops[i]) for token, logprob, rank, i in columns]
        if any(math.isnan(entry.logprob) for entry in entries):
            return RowResult(error=rules.row_error(False, None, True))
        return RowResult(prompt_logprobs=tuple(entries))

    def _score(self, logits: Tensor, row: Row, params: ScoringParams) -> RowResult:
        begin = row.prompt_len - params.num_scored
        logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        tempered, entropies = (
            torch.empty_like(logprobs) if wanted else None for wanted in (params.tempers, params.wants_entropies)
        )
        for batch, raw, tokens in self._batches(logits, row):
            logprobs[batch] = (raw.at(tokens).double() - raw.log_total()).float()
            if not bool(logprobs[batch].isfinite().all()):
                return RowResult(error=rules.row_error(False, None, True))
            if entropies is not None:
                entropies[batch] = raw.entropy().float()
            if tempered is not None:
                rows = [_before(row, position, begin) for position in row.scored[batch]]
                choice, _, errors = self._sampler.choose(
                    raw, rows, [group_of(each, raw.size) for each in rows], given=tokens
                )
                if (error := _first_error(choice, errors)) is not None:
                    return RowResult(error=error)
                tempered[batch] = choice.sampled.float()
        kept = logits if params.wants_logits else None
        score = Score(*(None if tensor is None else _array(tensor) for tensor in (logprobs, tempered, kept, entropies)))
        return RowResult(scores=ScorePart(row.scored.start - begin, score))


class Prefix(Sequence[int]):
    """The first tokens of a list that others may append to, without a copy."""

    def __init__(self, tokens: Sequence[int], length: int) -> None:
        self._tokens = tokens
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return self._tokens[slice(*index.indices(self._length))]
        return self._tokens[range(self._length)[index]]


def _before(row: Row, position: int, prompt_len: int) -> Row:
    """The row as it was when the token at `position` was to be drawn, after a prompt of `prompt_len` tokens."""
    return row._replace(
        tokens=Prefix(row.tokens, position),
        start=position - 1,
        end=position,
        samples=True,
        prompt_len=prompt_len,
        scored=NO_POSITIONS,
    )


def _first_error(choice: Choice, errors: dict[int, RequestError]) -> Exception | None:
    """What would have ended the request that drew these tokens."""
    if errors:
        return errors[min(errors)]
    return rules.row_error(True, None, bool(choice.possible.all()))


def _array(tensor: Tensor) -> FloatArray:
    """A copy, because the memory of logits belongs to the step."""
    return tensor.to("cpu", torch.float32, copy=True).numpy()

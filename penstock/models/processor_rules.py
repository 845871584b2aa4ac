"""The rules of transformers' logits processors that `rules` does not have, for the few rows that use them.

Owns their arithmetic, which is that of the classes named in `ProcessorParams`. Draws nothing. Called by `rules.apply`
with those rows only, as (index in `logits`, row, its rules); `logits` float32 [R, V] are written in place.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.processors import changes_logits
from penstock.step import Row

FLOAT_MAX = torch.finfo(torch.float32).max
_MAX_LOG_GROWTH = 80.0  # of a decay; e^88 is more than float32 holds


@dataclass(slots=True)
class NGrams:
    """Which tokens followed which `size - 1` others in one sequence. Grows with the sequence."""

    size: int
    num_counted: int = 0
    _followers: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))

    def banned(self, tokens: Sequence[int], draft: Sequence[int]) -> list[int]:
        """The tokens that would repeat an n-gram after `tokens` (prompt and output) and `draft`."""
        length = self.size - 1
        for end in range(max(self.num_counted, length), len(tokens)):
            self._followers[tuple(tokens[end - length : end])].append(tokens[end])
        self.num_counted = max(self.num_counted, len(tokens))
        tail = [*tokens[max(0, len(tokens) - length) :], *draft]
        if len(tail) < length:
            return []
        newest = tuple(tail[len(tail) - length :])
        in_draft = [tail[end] for end in range(length, len(tail)) if tuple(tail[end - length : end]) == newest]
        return [*self._followers.get(newest, ()), *in_draft]


@dataclass(frozen=True, slots=True)
class ProcessorRules:
    """One sequence's rules, without ids outside the vocabulary; a rule that is off is empty or None.

    `begin` is the length at which `begin_suppressed` applies, `forced` has tokens by the length at which they are
    forced, `decay` the length from which EOS gets likelier and the factor, and EOS is ruled out below `min_length`.
    """

    size: int
    suppressed: array[int]
    begin_suppressed: array[int]
    begin: int
    biases: tuple[tuple[tuple[int, ...], int, float], ...]  # preceding tokens, token, bias
    forced: dict[int, array[int]]
    decay: tuple[int, float] | None
    eos: array[int]
    min_length: int
    ngrams: NGrams | None

    @classmethod
    def of(cls, row: Row, eos_token_ids: frozenset[int], size: int) -> ProcessorRules | None:
        """The rules of `row` for a vocabulary of `size` tokens; None without any."""
        p = row.params
        if not changes_logits(p) and not p.min_new_tokens:
            return None
        assert isinstance(p.sequence_bias, dict | None)
        forces_bos = row.prompt_len == 1 and p.forced_bos_token_id is not None
        decay = p.exponential_decay_length_penalty
        return cls(
            size=size,
            suppressed=within(p.suppress_tokens or (), size),
            begin_suppressed=within(p.begin_suppress_tokens or (), size),
            begin=row.prompt_len + forces_bos,
            biases=tuple((ids[:-1], ids[-1], bias) for ids, bias in (p.sequence_bias or {}).items() if ids[-1] < size),
            forced=_forced(row, size),
            decay=None if decay is None else (row.prompt_len + decay[0], decay[1]),
            eos=within(() if p.ignore_eos else eos_token_ids, size),
            min_length=row.prompt_len + p.min_new_tokens,
            ngrams=NGrams(p.no_repeat_ngram_size) if p.no_repeat_ngram_size else None,
        )

    def continues(self, row: Row) -> bool:
        """Whether `row` is a later state of the sequence that these rules were made for."""
        return self.ngrams is None or self.ngrams.num_counted <= len(row.tokens)


RuledRows = Sequence[tuple[int, Row, ProcessorRules]]


def within(tokens: Iterable[int], size: int) -> array[int]:
    """The ids below `size`, in order, each once."""
    return array("q", sorted({token for token in tokens if 0 <= token < size}))


def _forced(row: Row, size: int) -> dict[int, array[int]]:
    p = row.params
    forced: dict[int, array[int]] = {}
    if p.forced_bos_token_id is not None:
        forced[1] = within([p.forced_bos_token_id], size)
    if p.forced_eos_token_id is not None and p.max_tokens is not None:
        assert isinstance(p.forced_eos_token_id, tuple)
        forced[row.prompt_len + p.max_tokens - 1] = within(p.forced_eos_token_id, size)
    return {length: ids for length, ids in forced.items() if ids}


def bias_sequences(logits: Tensor, ruled: RuledRows) -> None:
    """Add the biases of the tokens that would complete their sequences."""
    for i, row, rules in ruled:
        if rules.biases:
            longest = max(len(preceding) for preceding, _, _ in rules.biases)
            tokens = [*row.tokens[max(0, len(row.tokens) - longest) :], *row.draft]
            sums: dict[int, float] = defaultdict(float)
            for preceding, token, bias in rules.biases:
                if not preceding or tuple(tokens[-len(preceding) :]) == preceding:
                    sums[token] += bias
            _add(logits[i], sums)


def _add(logits: Tensor, biases: dict[int, float]) -> None:
    if biases:
        tokens = torch.tensor(list(biases), dtype=torch.int64, device=logits.device)
        values = torch.tensor(list(biases.values()), dtype=torch.float64, device=logits.device)
        logits[tokens] += values.clamp(-FLOAT_MAX, FLOAT_MAX).to(logits.dtype)


def banned_tokens(ruled: RuledRows) -> Iterator[tuple[int, Iterable[int]]]:
    """(row, tokens): EOS where it is too early, and tokens that would repeat an n-gram."""
    for i, row, rules in ruled:
        if row.end < rules.min_length:
            yield i, rules.eos
        if rules.ngrams is not None:
            yield i, [token for token in rules.ngrams.banned(row.tokens, row.draft) if token < rules.size]


def suppressed_tokens(ruled: RuledRows) -> Iterator[tuple[int, Iterable[int]]]:
    """(row, tokens) that are never drawn, or not at this length."""
    for i, row, rules in ruled:
        yield i, rules.suppressed
        if row.end == rules.begin:
            yield i, rules.begin_suppressed


def force_and_raise(logits: Tensor, ruled: RuledRows) -> None:
    """Leave nothing but the forced tokens, then apply the decay that raises EOS."""
    for i, row, rules in ruled:
        if row.end in rules.forced:
            _force(logits[i], rules.forced[row.end])
        if rules.decay is not None and row.end > rules.decay[0] and rules.eos:
            _raise(logits[i], rules.eos, row.end - rules.decay[0], rules.decay[1])


def _force(logits: Tensor, tokens: array[int]) -> None:
    logits[:] = -torch.inf
    logits[torch.tensor(tokens, dtype=torch.int64, device=logits.device)] = 0.0


def _raise(logits: Tensor, tokens: array[int], steps: int, factor: float) -> None:
    """Add |logit| * (factor^steps - 1) to the tokens that are not ruled out."""
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    chosen = logits[index]
    growth = factor**steps if steps * math.log(factor) < _MAX_LOG_GROWTH else math.exp(_MAX_LOG_GROWTH)
    raised = (chosen + chosen.abs() * (growth - 1)).clamp(max=FLOAT_MAX)
    logits[index] = torch.where(chosen.isfinite(), raised, chosen)

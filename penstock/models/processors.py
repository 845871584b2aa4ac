"""What transformers' logits processors do beyond our usual rules, for the few rows that ask for it.

Owns their arithmetic, which is that of the classes named in `ProcessorParams`. Draws nothing. Called by `rules.apply`
with those rows only, as (place in `logits`, row, its rules); `logits` float32 [R, V] are written in place.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.models.pairs import Pairs, inside
from penstock.processors import changes_logits
from penstock.step import Row

FLOAT_MAX = torch.finfo(torch.float32).max
_LOG_MOST = 80.0  # log of the greatest factor of a decay; e^88 is more than float32 holds


@dataclass(slots=True)
class NGrams:
    """Which tokens followed which `size - 1` others in one sequence. Grows with the sequence it is shown."""

    size: int
    num_seen: int = 0
    _followers: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))

    def banned(self, tokens: Sequence[int], draft: Sequence[int]) -> list[int]:
        """The tokens that would complete a run a second time after `tokens` (prompt and output) and `draft`."""
        before = self.size - 1
        for end in range(max(self.num_seen, before), len(tokens)):
            self._followers[tuple(tokens[end - before : end])].append(tokens[end])
        self.num_seen = max(self.num_seen, len(tokens))
        tail = [*tokens[max(0, len(tokens) - before) :], *draft]
        if len(tail) < before:
            return []
        newest = tuple(tail[len(tail) - before :])
        again = [tail[end] for end in range(before, len(tail)) if tuple(tail[end - before : end]) == newest]
        return [*self._followers.get(newest, ()), *again]


@dataclass(frozen=True, slots=True)
class ProcessorRules:
    """One sequence's, with every id outside the vocabulary dropped; what is not asked for is empty or None."""

    size: int
    suppressed: array[int]
    begin_suppressed: array[int]
    begin: int  # the length at which those apply
    biases: tuple[tuple[tuple[int, ...], int, float], ...]  # tokens before, token, bias
    forced: dict[int, array[int]]  # by the length at which they are
    decay: tuple[int, float] | None  # the length behind which EOS gets likelier, and the factor
    eos: array[int]
    least: int  # the length up to which EOS is ruled out
    ngrams: NGrams | None

    @classmethod
    def of(cls, row: Row, eos_token_ids: frozenset[int], size: int) -> ProcessorRules | None:
        """Those of `row` for a vocabulary of `size` tokens; None without any."""
        p = row.params
        if not changes_logits(p) and not p.min_new_tokens:
            return None
        assert isinstance(p.sequence_bias, dict | None)
        late = row.prompt_len == 1 and p.forced_bos_token_id is not None
        decay = p.exponential_decay_length_penalty
        return cls(
            size=size,
            suppressed=inside(p.suppress_tokens or (), size),
            begin_suppressed=inside(p.begin_suppress_tokens or (), size),
            begin=row.prompt_len + late,
            biases=tuple((ids[:-1], ids[-1], bias) for ids, bias in (p.sequence_bias or {}).items() if ids[-1] < size),
            forced=_forced(row, size),
            decay=None if decay is None else (row.prompt_len + decay[0], decay[1]),
            eos=inside(() if p.ignore_eos else eos_token_ids, size),
            least=row.prompt_len + p.min_new_tokens,
            ngrams=NGrams(p.no_repeat_ngram_size) if p.no_repeat_ngram_size else None,
        )

    def continues(self, row: Row) -> bool:
        """Whether `row` is a later state of the sequence these rules were made for."""
        return self.ngrams is None or self.ngrams.num_seen <= len(row.tokens)


Ruled = Sequence[tuple[int, Row, ProcessorRules]]


def _forced(row: Row, size: int) -> dict[int, array[int]]:
    p = row.params
    forced: dict[int, array[int]] = {}
    if p.forced_bos_token_id is not None:
        forced[1] = inside([p.forced_bos_token_id], size)
    if p.forced_eos_token_id is not None and p.max_tokens is not None:
        assert isinstance(p.forced_eos_token_id, tuple)
        forced[row.prompt_len + p.max_tokens - 1] = inside(p.forced_eos_token_id, size)
    return {length: ids for length, ids in forced.items() if ids}


def bias_sequences(logits: Tensor, ruled: Ruled) -> None:
    """Add the biases of tokens whose sequences they would complete."""
    for i, row, rules in ruled:
        if rules.biases:
            longest = max(len(before) for before, _, _ in rules.biases)
            tokens = [*row.tokens[max(0, len(row.tokens) - longest) :], *row.draft]
            added: dict[int, float] = defaultdict(float)
            for before, token, bias in rules.biases:
                if not before or tuple(tokens[-len(before) :]) == before:
                    added[token] += bias
            _add(logits[i], added)


def _add(logits: Tensor, added: dict[int, float]) -> None:
    if added:
        tokens = torch.tensor(list(added), dtype=torch.int64, device=logits.device)
        values = torch.tensor(list(added.values()), dtype=torch.float64, device=logits.device)
        logits[tokens] += values.clamp(-FLOAT_MAX, FLOAT_MAX).to(logits.dtype)


def ban(logits: Tensor, ruled: Ruled) -> None:
    """Rule out EOS where it is too early, and tokens that would complete an n-gram a second time."""
    pairs = Pairs()
    for i, row, rules in ruled:
        if row.end < rules.least:
            pairs.add(i, rules.eos)
        if rules.ngrams is not None:
            pairs.add(i, (token for token in rules.ngrams.banned(row.tokens, row.draft) if token < rules.size))
    _suppress(logits, pairs)


def force_and_suppress(logits: Tensor, ruled: Ruled) -> None:
    """Forced tokens, then the decay that raises EOS, then tokens that are suppressed."""
    pairs = Pairs()
    for i, row, rules in ruled:
        if row.end in rules.forced:
            _force(logits[i], rules.forced[row.end])
        if rules.decay is not None and row.end > rules.decay[0] and rules.eos:
            _raise(logits[i], rules.eos, row.end - rules.decay[0], rules.decay[1])
        pairs.add(i, rules.suppressed)
        if row.end == rules.begin:
            pairs.add(i, rules.begin_suppressed)
    _suppress(logits, pairs)


def _force(logits: Tensor, tokens: array[int]) -> None:
    logits[:] = -torch.inf
    logits[torch.tensor(tokens, dtype=torch.int64, device=logits.device)] = 0.0


def _raise(logits: Tensor, tokens: array[int], steps: int, factor: float) -> None:
    """Add |logit| * (factor^steps - 1), to what is not ruled out."""
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    chosen = logits[index]
    growth = factor**steps if steps * math.log(factor) < _LOG_MOST else math.exp(_LOG_MOST)
    raised = (chosen + chosen.abs() * (growth - 1)).clamp(max=FLOAT_MAX)
    logits[index] = torch.where(chosen.isfinite(), raised, chosen)


def _suppress(logits: Tensor, pairs: Pairs) -> None:
    if pairs:
        logits[pairs.tensors(logits.device)] = -torch.inf

"""Logits rules as pure functions of tensors: what a request may do to its logits before a token is drawn.

Owns the arithmetic of the rules, batched over rows that each have their own parameters, and the order of all: bias,
allowed tokens, suppressed tokens, penalties, forced tokens, user processors. Knows nothing of drawing. Called by the
sampler.

A rule takes `logits` float32 [R, V] and writes into them; (rows, tokens) int64 [K] name the logits it touches, no
pair twice. `SequenceRules` is what one sequence's rules boil down to: ids inside the vocabulary, and token counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.errors import ExecutionError, RequestError, described, text_of
from penstock.models import processors
from penstock.models.pairs import Pairs, inside, int64
from penstock.models.processors import ProcessorRules
from penstock.sampling import LogitsProcessor, SamplingParams
from penstock.step import Row

FLOAT_MAX = torch.finfo(torch.float32).max
FLOAT_TINY = torch.finfo(torch.float32).tiny


def add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, bias: Tensor) -> None:
    """Add bias [K] of any float dtype, cut to what float32 holds."""
    logits[rows, tokens] += bias.clamp(-FLOAT_MAX, FLOAT_MAX).to(logits.dtype)


def allow_only(logits: Tensor, limited: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Rule out every token of the rows `limited` int64 [L] but the (rows, tokens) named."""
    kept = logits[rows, tokens]
    logits[limited] = -torch.inf
    logits[rows, tokens] = kept


def suppress(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Rule out tokens; here a pair may be named twice."""
    logits[rows, tokens] = -torch.inf


def penalize(logits: Tensor, rows: Tensor, tokens: Tensor, counts: Tensor, penalties: Tensor) -> None:
    """Penalize tokens for having been seen: repetition [1], then frequency and presence as OpenAI defines them.

    counts [K]: how often the pair's token is in the row's output (0: only in its prompt). penalties float32 [R, 3]:
    repetition, frequency, presence. [1] Keskar et al. 2019, https://arxiv.org/abs/1909.05858.
    """
    repetition, frequency, presence = penalties[rows].unbind(-1)
    seen = logits[rows, tokens]
    seen = torch.where(seen < 0, seen * repetition, seen / repetition)
    logits[rows, tokens] = seen - counts * frequency - (counts > 0) * presence


def completed_bad_words(words: Iterable[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    """The tokens that would complete one of `words` (token ids) after `tokens`, prompt and output."""
    return [w[-1] for w in words if len(w) == 1 or tuple(tokens[-(len(w) - 1) :]) == tuple(w[:-1])]


def run_processor(processor: LogitsProcessor, output: list[int], logits: Tensor) -> None:
    """Let a user's processor rewrite one row, float32 [V]. Raises `RequestError` when it fails or returns nonsense.

    It works on a copy, since what it keeps it may read and write at any time, and this memory holds other rows then.
    """
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()):  # undoes what it changes of autograd's modes
            result = processor(output, logits.clone())
        if not isinstance(result, Tensor) or result.shape != logits.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise RequestError(f"it must return a tensor of shape {tuple(logits.shape)}, got {got}")
        logits.copy_(result.detach())
    except BaseException as error:  # not all that user code raises is an `Exception`
        what = text_of(error) if isinstance(error, RequestError) else described(error)
        raise RequestError(f"logits processor {_name(processor)} failed: {what}") from error
    logits.clamp_(max=FLOAT_MAX)  # +inf means "this one"; its difference to itself must stay 0


def _name(processor: LogitsProcessor) -> str:
    try:
        return str(getattr(processor, "__name__", type(processor).__name__))
    except BaseException:
        return type(processor).__name__


@dataclass(slots=True)
class TokenCounts:
    """How often each token was seen in one sequence: `tokens[i]` is `counts[i]` times in its output.

    Prompt tokens are listed too, with what the output adds to them. Grows with the sequence it is shown.
    """

    size: int
    num_seen: int = 0
    tokens: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    _slots: dict[int, int] = field(default_factory=dict)

    def update(self, tokens: Sequence[int], prompt_len: int) -> None:
        """Count what was appended to `tokens` (prompt and output) since the last call."""
        for position in range(self.num_seen, len(tokens)):
            if tokens[position] < self.size:
                self._add(tokens[position], int(position >= prompt_len))
        self.num_seen = len(tokens)

    def ahead(self, draft: Sequence[int]) -> tuple[array[int], array[int]]:
        """Tokens and counts as they were if `draft` were output too. Nothing is remembered of it."""
        if not draft:
            return self.tokens, self.counts
        tokens, counts = self.tokens[:], self.counts[:]
        slots = dict[int, int]()
        for token in (token for token in draft if token < self.size):
            slot = self._slots.get(token, slots.get(token))
            if slot is None:
                slot = slots[token] = len(tokens)
                tokens.append(token)
                counts.append(0)
            counts[slot] += 1
        return tokens, counts

    def _add(self, token: int, count: int) -> None:
        slot = self._slots.setdefault(token, len(self.tokens))
        if slot == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[slot] += count


@dataclass(frozen=True, slots=True)
class SequenceRules:
    """One sequence's rules, with every id outside the vocabulary dropped. `counts` is None without penalties."""

    params: SamplingParams
    bias: dict[int, float]
    allowed: array[int] | None
    held_back: array[int]  # what min_tokens suppresses: EOS and every stop id
    bad_words: tuple[tuple[int, ...], ...]
    counts: TokenCounts | None
    processors: ProcessorRules | None

    @classmethod
    def of(cls, row: Row, eos_token_ids: frozenset[int], size: int) -> SequenceRules:
        """Boil down the rules of `row` for a vocabulary of `size` tokens."""
        p = row.params
        penalized = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        words = [tuple(word) for word in p.bad_words if not isinstance(word, str)]
        return cls(
            params=p,
            bias={token: bias for token, bias in (p.logit_bias or {}).items() if token < size},
            allowed=None if p.allowed_token_ids is None else inside(p.allowed_token_ids, size),
            held_back=inside(row.stop_ids | eos_token_ids, size),
            bad_words=tuple(word for word in words if 0 <= word[-1] < size),
            counts=TokenCounts(size) if penalized else None,
            processors=ProcessorRules.of(row, eos_token_ids, size),
        )

    def continues(self, row: Row) -> bool:
        """Whether `row` is a later state of the sequence these rules were made for."""
        if self.params is not row.params or (self.processors is not None and not self.processors.continues(row)):
            return False
        return self.counts is None or self.counts.num_seen <= len(row.tokens)


def has_rules(row: Row) -> bool:
    """Whether any rule touches this row, of which the token at position `end` is to be drawn."""
    return row.params.is_ruled or row.end - row.prompt_len < row.params.num_held


def apply(logits: Tensor, rows: Sequence[Row], sequences: Sequence[SequenceRules]) -> dict[int, RequestError]:
    """Apply every rule of every row to `logits` float32 [R, V], in place.

    `sequences[i]` belongs to `rows[i]`. Returns the errors of user processors by row; such a row's logits are void.
    """
    extras = [(i, rows[i], rules.processors) for i, rules in enumerate(sequences) if rules.processors is not None]
    _apply_bias(logits, sequences)
    processors.bias_sequences(logits, extras)
    _apply_allowed(logits, sequences)
    _apply_suppressed(logits, rows, sequences)
    processors.ban(logits, extras)
    _apply_penalties(logits, rows, sequences)
    processors.force_and_suppress(logits, extras)
    return _apply_processors(logits, rows)


def row_error(sane: bool, failed: RequestError | None, possible: bool) -> Exception | None:
    """What ends a row: logits that are no numbers, a rule that failed, or rules that leave nothing to choose."""
    if not sane:
        return ExecutionError(
            "the model returned logits that are NaN or infinite: look for such numbers in its weights (training that "
            "diverged, a damaged file), and try dtype='bfloat16' or 'float32' if it runs in float16, which overflows"
        )
    if failed is None and not possible:
        return RequestError(
            "no token is left to choose: allowed_token_ids, suppress_tokens, no_repeat_ngram_size, bad_words, "
            "min_tokens, logit_bias and logits_processors together rule out the whole vocabulary (or a processor "
            "returned NaN); relax one of them"
        )
    return failed


def _apply_bias(logits: Tensor, sequences: Sequence[SequenceRules]) -> None:
    pairs, values = Pairs(), list[float]()
    for i, rules in enumerate(sequences):
        if rules.bias:
            pairs.add(i, rules.bias)
            values += rules.bias.values()
    if pairs:
        bias = torch.tensor(values, dtype=torch.float64, device=logits.device)
        add_bias(logits, *pairs.tensors(logits.device), bias)


def _apply_allowed(logits: Tensor, sequences: Sequence[SequenceRules]) -> None:
    limited = [i for i, rules in enumerate(sequences) if rules.allowed is not None]
    pairs = Pairs()
    for i in limited:
        pairs.add(i, sequences[i].allowed or ())
    if limited and pairs:
        allow_only(logits, int64(array("q", limited), logits.device), *pairs.tensors(logits.device))
    elif limited:
        logits[limited] = -torch.inf


def _apply_suppressed(logits: Tensor, rows: Sequence[Row], sequences: Sequence[SequenceRules]) -> None:
    pairs = Pairs()
    for i, (row, rules) in enumerate(zip(rows, sequences, strict=True)):
        if rules.bad_words:
            longest = max(map(len, rules.bad_words))
            pairs.add(i, completed_bad_words(rules.bad_words, [*row.tokens[-longest:], *row.draft]))
        if row.end - row.prompt_len < rules.params.min_tokens:
            pairs.add(i, rules.held_back)
    if pairs:
        suppress(logits, *pairs.tensors(logits.device))


def _apply_penalties(logits: Tensor, rows: Sequence[Row], sequences: Sequence[SequenceRules]) -> None:
    pairs, counts, penalties = Pairs(), array("q"), [(1.0, 0.0, 0.0)] * len(rows)
    for i, (row, rules) in enumerate(zip(rows, sequences, strict=True)):
        if rules.counts is not None:
            rules.counts.update(row.tokens, row.prompt_len)
            tokens, seen = rules.counts.ahead(row.draft)
            pairs.add(i, tokens)
            counts += seen
            p = rules.params
            penalties[i] = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
    if pairs:
        device = logits.device
        strengths = torch.tensor(penalties, dtype=torch.float32, device=device)
        penalize(logits, *pairs.tensors(device), int64(counts, device), strengths)


def _apply_processors(logits: Tensor, rows: Sequence[Row]) -> dict[int, RequestError]:
    errors: dict[int, RequestError] = {}
    for i, row in enumerate(rows):
        try:
            for processor in row.params.logits_processors:
                run_processor(processor, [*row.tokens[row.prompt_len :], *row.draft], logits[i])
        except RequestError as error:
            errors[i] = error
    return errors

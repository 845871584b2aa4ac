"""Logits rules as pure functions of tensors: what a request may do to its logits before a token is drawn.

Owns the arithmetic of the rules, batched over rows that each have their own parameters, and the order of all of them:
bias, allowed tokens, suppressed tokens, penalties, forced tokens, user processors. Draws nothing. Called by the
samplers.

A rule writes into `logits` float32 [R, V]; (rows, tokens) int64 [K] are the logits that it touches, no pair twice.
`SequenceRules` holds what one sequence's parameters come down to: ids inside the vocabulary, and token counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.errors import ExecutionError, RequestError, described, text_of
from penstock.models import processor_rules
from penstock.models.processor_rules import ProcessorRules, within
from penstock.sampling import LogitsProcessor, SamplingParams
from penstock.step import Row

FLOAT_MAX = torch.finfo(torch.float32).max
FLOAT_TINY = torch.finfo(torch.float32).tiny


class Pairs:
    """(row, token) pairs, collected without a tensor per row."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._tokens = array("q")

    def add(self, row: int, tokens: Iterable[int]) -> None:
        """Add tokens of one row."""
        num_tokens = len(self._tokens)
        self._tokens.extend(tokens)
        self._rows.append(row)
        self._lengths.append(len(self._tokens) - num_tokens)

    def add_all(self, pairs: Iterable[tuple[int, Iterable[int]]]) -> None:
        """Add (row, its tokens) of several rows."""
        for row, tokens in pairs:
            self.add(row, tokens)

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and tokens, int64 [K] each."""
        columns = [torch.tensor(values, dtype=torch.int64, device="cpu") for values in (self._rows, self._lengths)]
        rows = torch.repeat_interleave(*columns)
        return rows.to(device), _int64(self._tokens, device)


def _int64(values: array[int], device: torch.device) -> Tensor:
    """The numbers on a device; there must be one at least."""
    return torch.frombuffer(values, dtype=torch.int64).to(device)


def add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, bias: Tensor) -> None:
    """Add bias [K] of any float dtype, clamped to what float32 holds."""
    logits[rows, tokens] += bias.clamp(-FLOAT_MAX, FLOAT_MAX).to(logits.dtype)


def allow_only(logits: Tensor, limited: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Rule out every token of the rows `limited` int64 [L] but the pairs (rows, tokens)."""
    allowed = logits[rows, tokens]
    logits[limited] = -torch.inf
    logits[rows, tokens] = allowed


def suppress(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Rule out tokens; here a pair may occur twice."""
    logits[rows, tokens] = -torch.inf


def penalize(logits: Tensor, rows: Tensor, tokens: Tensor, counts: Tensor, penalties: Tensor) -> None:
    """Penalize tokens that occurred: repetition [1], then frequency and presence as OpenAI defines them.

    counts [K]: how often the pair's token is in the row's output (0: only in its prompt). penalties float32 [R, 3]:
    repetition, frequency, presence. [1] Keskar et al. 2019, https://arxiv.org/abs/1909.05858.
    """
    repetition, frequency, presence = penalties[rows].unbind(-1)
    values = logits[rows, tokens]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits[rows, tokens] = values - counts * frequency - (counts > 0) * presence


def completed_bad_words(words: Iterable[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    """The tokens that would complete one of `words` (token ids) after `tokens`, prompt and output."""
    return [w[-1] for w in words if len(w) == 1 or tuple(tokens[-(len(w) - 1) :]) == tuple(w[:-1])]


def run_processor(processor: LogitsProcessor, output: list[int], logits: Tensor) -> None:
    """Let a user's processor rewrite one row, float32 [V]. Raises `RequestError` when it fails or returns nonsense.

    It works on a copy: it may keep what it is given and read or write it at any time, when this memory holds other
    rows.
    """
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()):  # restores the autograd modes that it changes
            result = processor(output, logits.clone())
        if not isinstance(result, Tensor) or result.shape != logits.shape:
            actual = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise RequestError(f"it must return a tensor of shape {tuple(logits.shape)}, got {actual}")
        logits.copy_(result.detach())
    except BaseException as error:  # user code may raise more than `Exception`
        reason = text_of(error) if isinstance(error, RequestError) else described(error)
        text = f"logits processor {_name(processor)} failed: {reason}"
        raise RequestError(text, parameter="logits_processors") from error
    logits.clamp_(max=FLOAT_MAX)  # +inf means "this one"; its difference to itself must stay 0


def _name(processor: LogitsProcessor) -> str:
    try:
        return str(getattr(processor, "__name__", type(processor).__name__))
    except BaseException:
        return type(processor).__name__


@dataclass(slots=True)
class TokenCounts:
    """The distinct tokens of one sequence: `tokens[i]` occurs `counts[i]` times in its output, 0 if in its prompt only.

    Grows with the sequence.
    """

    size: int
    num_counted: int = 0
    tokens: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    _indices: dict[int, int] = field(default_factory=dict)

    def update(self, tokens: Sequence[int], prompt_len: int) -> None:
        """Count what was appended to `tokens` (prompt and output) since the last call."""
        for position in range(self.num_counted, len(tokens)):
            if tokens[position] < self.size:
                self._add(tokens[position], int(position >= prompt_len))
        self.num_counted = len(tokens)

    def with_draft(self, draft: Sequence[int]) -> tuple[array[int], array[int]]:
        """Tokens and counts as they would be with `draft` in the output; the draft is not counted."""
        if not draft:
            return self.tokens, self.counts
        tokens, counts = self.tokens[:], self.counts[:]
        indices = dict[int, int]()
        for token in (token for token in draft if token < self.size):
            index = self._indices.get(token, indices.get(token))
            if index is None:
                index = indices[token] = len(tokens)
                tokens.append(token)
                counts.append(0)
            counts[index] += 1
        return tokens, counts

    def _add(self, token: int, count: int) -> None:
        index = self._indices.setdefault(token, len(self.tokens))
        if index == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[index] += count


@dataclass(frozen=True, slots=True)
class SequenceRules:
    """One sequence's rules, without ids outside the vocabulary. `counts` is None without penalties.

    `min_tokens_ids` are what `min_tokens` suppresses: EOS and every stop id.
    """

    params: SamplingParams
    bias: dict[int, float]
    allowed: array[int] | None
    min_tokens_ids: array[int]
    bad_words: tuple[tuple[int, ...], ...]
    counts: TokenCounts | None
    processor_rules: ProcessorRules | None

    @classmethod
    def of(cls, row: Row, eos_token_ids: frozenset[int], size: int) -> SequenceRules:
        """The rules of `row` for a vocabulary of `size` tokens."""
        p = row.params
        penalized = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        words = [tuple(word) for word in p.bad_words if not isinstance(word, str)]
        return cls(
            params=p,
            bias={token: bias for token, bias in (p.logit_bias or {}).items() if token < size},
            allowed=None if p.allowed_token_ids is None else within(p.allowed_token_ids, size),
            min_tokens_ids=within(row.stop_ids | eos_token_ids, size),
            bad_words=tuple(word for word in words if word[-1] < size),
            counts=TokenCounts(size) if penalized else None,
            processor_rules=ProcessorRules.of(row, eos_token_ids, size),
        )

    def continues(self, row: Row) -> bool:
        """Whether `row` is a later state of the sequence that these rules were made for."""
        if self.params is not row.params:
            return False
        if self.processor_rules is not None and not self.processor_rules.continues(row):
            return False
        return self.counts is None or self.counts.num_counted <= len(row.tokens)


def has_rules(row: Row) -> bool:
    """Whether any rule touches the logits of this row, whose token at position `end` is to be drawn; a mask is none."""
    return row.params.is_ruled or row.end - row.prompt_len < row.params.num_held


def apply(logits: Tensor, rows: Sequence[Row], sequences: Sequence[SequenceRules]) -> dict[int, RequestError]:
    """Apply every rule of every row to `logits` float32 [R, V], in place.

    `sequences[i]` belongs to `rows[i]`. Returns the errors of user processors by row; the logits of such a row are
    void.
    """
    columns = zip(rows, sequences, strict=True)
    ruled = [(i, row, s.processor_rules) for i, (row, s) in enumerate(columns) if s.processor_rules is not None]
    _apply_bias(logits, sequences)
    processor_rules.bias_sequences(logits, ruled)
    _apply_allowed(logits, sequences)
    _apply_suppressed(logits, rows, sequences, ruled)
    _apply_penalties(logits, rows, sequences)
    processor_rules.force_and_raise(logits, ruled)
    _suppress(logits, processor_rules.suppressed_tokens(ruled))
    return _apply_processors(logits, rows)


def row_error(finite: bool, processor_error: RequestError | None, any_token: bool) -> Exception | None:
    """What ends a row: logits that are not finite, a processor that failed, or rules that leave no token."""
    if not finite:
        return ExecutionError(
            "the model returned logits that are NaN or infinite: look for such numbers in its weights (training that "
            "diverged, a damaged file), and try dtype='bfloat16' or 'float32' if it runs in float16, which overflows"
        )
    if processor_error is None and not any_token:
        return RequestError(
            "no token is left to choose: structured_outputs, allowed_token_ids, suppress_tokens, no_repeat_ngram_size, "
            "bad_words, min_tokens, logit_bias and logits_processors together rule out the whole vocabulary (or a "
            "processor returned NaN); relax one of them"
        )
    return processor_error


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
    pairs.add_all((i, sequences[i].allowed or ()) for i in limited)
    if limited and pairs:
        allow_only(logits, _int64(array("q", limited), logits.device), *pairs.tensors(logits.device))
    elif limited:
        logits[limited] = -torch.inf


def _apply_suppressed(
    logits: Tensor, rows: Sequence[Row], sequences: Sequence[SequenceRules], ruled: processor_rules.RuledRows
) -> None:
    pairs = Pairs()
    for i, (row, rules) in enumerate(zip(rows, sequences, strict=True)):
        if rules.bad_words:
            longest = max(map(len, rules.bad_words))
            pairs.add(i, completed_bad_words(rules.bad_words, [*row.tokens[-longest:], *row.draft]))
        if row.end - row.prompt_len < rules.params.min_tokens:
            pairs.add(i, rules.min_tokens_ids)
    pairs.add_all(processor_rules.banned_tokens(ruled))
    if pairs:
        suppress(logits, *pairs.tensors(logits.device))


def _suppress(logits: Tensor, tokens: Iterable[tuple[int, Iterable[int]]]) -> None:
    pairs = Pairs()
    pairs.add_all(tokens)
    if pairs:
        suppress(logits, *pairs.tensors(logits.device))


def _apply_penalties(logits: Tensor, rows: Sequence[Row], sequences: Sequence[SequenceRules]) -> None:
    pairs, counts, penalties = Pairs(), array("q"), [(1.0, 0.0, 0.0)] * len(rows)
    for i, (row, rules) in enumerate(zip(rows, sequences, strict=True)):
        if rules.counts is not None:
            rules.counts.update(row.tokens, row.prompt_len)
            tokens, token_counts = rules.counts.with_draft(row.draft)
            pairs.add(i, tokens)
            counts += token_counts
            p = rules.params
            penalties[i] = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
    if pairs:
        device = logits.device
        strengths = torch.tensor(penalties, dtype=torch.float32, device=device)
        penalize(logits, *pairs.tensors(device), _int64(counts, device), strengths)


def _apply_processors(logits: Tensor, rows: Sequence[Row]) -> dict[int, RequestError]:
    errors: dict[int, RequestError] = {}
    for i, row in enumerate(rows):
        try:
            for processor in row.params.logits_processors:
                run_processor(processor, [*row.tokens[row.prompt_len :], *row.draft], logits[i])
        except RequestError as error:
            errors[i] = error
    return errors

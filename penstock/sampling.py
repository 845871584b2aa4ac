"""What a caller may ask of the sampler: `SamplingParams`, validated once, at the door, then frozen.

Owns parameter names, ranges and defaults. Never looks at tokens or tensors. Built by callers, read by everyone below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

from penstock import processors
from penstock.errors import RequestError

# A user's logits processor: (output token ids so far, float32 logits [vocab]) -> float32 logits [vocab].
LogitsProcessor = Callable[[Sequence[int], Any], Any]
# A user's judgement of a finished `CompletionOutput`: the higher, the better.
Scorer = Callable[[Any], float]

RANKINGS = ("cumulative_logprob", "normalized_logprob")


class RequestPriority(IntEnum):
    """Higher is served first; a class never changes, waiting only moves a request forward in the queue."""

    LOW = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4


class OutputKind(Enum):
    """What a streamed `RequestOutput` holds: all text so far, only the new text, or only the final result."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(processors.ProcessorParams):
    """How to choose the tokens of one request.

    `temperature=0` is greedy; `top_k` of 0 or -1, `top_p=1` and `min_p=0` are off. `max_tokens` counts new tokens;
    None means "until the model's limit". Presence and frequency penalties look at the output only, repetition
    penalty at prompt and output. `min_tokens` suppresses EOS, stop ids and stop strings until reached. `logprobs=k`
    returns the k most likely tokens and the chosen one; -1 the whole vocabulary. The same `seed` gives
    the same random numbers whatever else runs. `speculation_length` is the most tokens to guess at once where the
    engine speculates, never more than it is set to (0: none; None: that many); it never changes the output, as long as
    `logits_processors` look at their arguments only. Raises `RequestError` saying which value is wrong.

    `n` completions share the K/V of their prompt, which is computed once. `best_of` (at least n) runs that many and
    returns the best n, best first, by `rank_by`: "cumulative_logprob" (the default), "normalized_logprob" (that,
    divided by the number of tokens to the power of `length_penalty`), or a function of a `CompletionOutput`; with
    `rank_by` and no `best_of`, n completions are sorted. `use_beam_search` keeps the `best_of` (or n) likeliest
    beginnings at every position instead, as `transformers` does with `num_beams`: `length_penalty` and
    `early_stopping` (True, False or "never") mean what they mean there. What is ranked is delivered at the end.

    `is_ruled`, `num_held` and `is_cut` say what follows from the parameters: whether rules change the logits of every
    token, how many first tokens cannot be EOS, and whether draws are restricted by more than top-k, top-p and min-p.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: OutputKind = OutputKind.CUMULATIVE
    rank_by: str | Scorer | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    speculation_length: int | None = None
    is_ruled: bool = field(init=False, repr=False, compare=False)
    num_held: int = field(init=False, repr=False, compare=False)
    is_cut: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (
            *processors.normalized(self).items(),
            ("stop", _tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)),
            ("stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids)),
            ("bad_words", _tuple("bad_words", self.bad_words)),
            ("logits_processors", _tuple("logits_processors", self.logits_processors)),
            ("output_kind", _output_kind(self.output_kind)),
            ("logprobs", _count(self.logprobs)),
            ("prompt_logprobs", _count(self.prompt_logprobs)),
            ("top_k", 0 if self.top_k in (None, -1) else self.top_k),
            ("top_p", 1.0 if self.top_p is None else self.top_p),
        ):
            object.__setattr__(self, name, value)
        _validate(self)
        object.__setattr__(self, "is_ruled", _is_ruled(self))
        object.__setattr__(self, "num_held", max(self.min_tokens, self.min_new_tokens))
        object.__setattr__(self, "is_cut", processors.restricts_draws(self))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def num_samples(self) -> int:
        """How many candidates this request has: `best_of`, or `n`."""
        return self.best_of or self.n

    @property
    def num_sequences(self) -> int:
        """How many sequences run for them: where nothing is drawn, all would be alike, and one is enough."""
        alike = self.greedy and not self.logits_processors and not self.use_beam_search
        return 1 if alike else self.num_samples

    @property
    def num_texts(self) -> int:
        """How many texts are collected: of a beam search, only those that are returned."""
        return self.n if self.use_beam_search else self.num_sequences

    @property
    def num_beams(self) -> int:
        """Width of the beam search; 0 when there is none."""
        return self.num_samples if self.use_beam_search else 0

    @property
    def is_ranked(self) -> bool:
        """Whether completions are delivered best first, and so at the end only."""
        return self.num_samples > self.n or self.rank_by is not None or self.use_beam_search


def _tuple(name: str, values: Any) -> tuple[Any, ...]:
    try:
        return tuple(values or ())
    except TypeError:
        raise RequestError(f"{name} must be a list, got {values!r}") from None


def _output_kind(value: OutputKind | str) -> OutputKind:
    try:
        return OutputKind(value)
    except ValueError:
        known = ", ".join(repr(kind.value) for kind in OutputKind)
        raise RequestError(f"output_kind must be an OutputKind or one of {known}, got {value!r}") from None


def _count(value: int | bool | None) -> int | None:
    """`logprobs=True` is how the OpenAI API says "just the chosen token"."""
    if value is True:
        return 0
    return None if value is False else value


def _is_ruled(p: SamplingParams) -> bool:
    return bool(
        p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or p.logit_bias
        or p.bad_words
        or p.logits_processors
        or p.allowed_token_ids is not None
        or processors.changes_logits(p)
    )


def _validate(p: SamplingParams) -> None:
    _check_numbers(p)
    processors.check(p)
    _check_counts(p)
    _check_stops(p)
    _check_ranking(p)


def _need(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise RequestError(f"{name} must be {rule}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(p: SamplingParams) -> None:
    for name, low, high, rule in (
        ("temperature", 0.0, math.inf, "a finite number >= 0"),
        ("min_p", 0.0, 1.0, "between 0 and 1"),
        ("presence_penalty", -2.0, 2.0, "between -2 and 2"),
        ("frequency_penalty", -2.0, 2.0, "between -2 and 2"),
        ("length_penalty", -math.inf, math.inf, "a finite number"),
    ):
        value = getattr(p, name)
        _need(_is_finite(value) and low <= value <= high, name, value, rule)
    _need(_is_finite(p.top_p) and 0.0 < p.top_p <= 1.0, "top_p", p.top_p, "above 0 and at most 1")
    _need(
        _is_finite(p.repetition_penalty) and p.repetition_penalty > 0,
        "repetition_penalty",
        p.repetition_penalty,
        "a number above 0",
    )
    _need(
        p.logit_bias is None or isinstance(p.logit_bias, Mapping), "logit_bias", p.logit_bias, "a mapping of token ids"
    )
    for token, bias in (p.logit_bias or {}).items():
        _need(
            _is_int(token) and token >= 0 and _is_finite(bias),
            "logit_bias",
            {token: bias},
            "token ids with finite numbers",
        )


def _check_counts(p: SamplingParams) -> None:
    _need(_is_int(p.n) and p.n >= 1, "n", p.n, "an integer >= 1")
    if p.best_of is not None:
        _need(_is_int(p.best_of) and p.best_of >= p.n, "best_of", p.best_of, f"an integer >= n ({p.n})")
    _need(_is_int(p.top_k) and p.top_k >= 0, "top_k", p.top_k, "an integer >= 0 (0 or -1 turns it off)")
    if p.max_tokens is not None:
        _need(
            _is_int(p.max_tokens) and p.max_tokens >= 1,
            "max_tokens",
            p.max_tokens,
            "an integer >= 1, or None for no limit",
        )
    _need(_is_int(p.min_tokens) and p.min_tokens >= 0, "min_tokens", p.min_tokens, "an integer >= 0")
    if p.max_tokens is not None:
        _need(p.min_tokens <= p.max_tokens, "min_tokens", p.min_tokens, f"at most max_tokens ({p.max_tokens})")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(p, name)
        _need(value is None or (_is_int(value) and value >= -1), name, value, "None, -1 (all) or an integer >= 0")
    length = p.speculation_length
    _need(length is None or (_is_int(length) and length >= 0), "speculation_length", length, "None or an integer >= 0")
    if p.seed is not None:
        _need(_is_int(p.seed), "seed", p.seed, "an integer or None")
    if p.allowed_token_ids is not None:
        _tuple("allowed_token_ids", p.allowed_token_ids)
        _need(
            len(p.allowed_token_ids) > 0,
            "allowed_token_ids",
            p.allowed_token_ids,
            "a non-empty list of token ids, or None",
        )


def _check_stops(p: SamplingParams) -> None:
    assert p.stop is not None
    assert p.stop_token_ids is not None
    _need(all(isinstance(s, str) and s for s in p.stop), "stop", p.stop, "non-empty strings")
    _need(all(_is_int(t) for t in p.stop_token_ids), "stop_token_ids", p.stop_token_ids, "integers")
    _need(p.detokenize or not p.stop, "stop", p.stop, "empty when detokenize=False: stop strings need text")
    _need(all(w for w in p.bad_words), "bad_words", p.bad_words, "non-empty strings or token id lists")
    _need(all(callable(f) for f in p.logits_processors), "logits_processors", p.logits_processors, "callables")


def _check_ranking(p: SamplingParams) -> None:
    known = p.rank_by is None or callable(p.rank_by) or p.rank_by in RANKINGS
    _need(known, "rank_by", p.rank_by, f"a function of a completion, or one of {', '.join(map(repr, RANKINGS))}")
    _need(p.early_stopping in (True, False, "never"), "early_stopping", p.early_stopping, 'True, False or "never"')
    if p.use_beam_search:
        _need(p.num_samples > 1, "best_of", p.best_of, "the width of the beam search, at least 2")
        _need(p.temperature == 0, "temperature", p.temperature, "0 with use_beam_search, which draws nothing")
        _need(p.rank_by is None, "rank_by", p.rank_by, "None with use_beam_search, which ranks by its own scores")

"""The parameters of a request: `SamplingParams`, validated when constructed, then frozen.

Owns the names, ranges and defaults of parameters. Never handles tokens or tensors. Constructed by callers, read by
every layer below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, ClassVar

from penstock import processors, values
from penstock.outputs import CompletionOutput
from penstock.structured_outputs import StructuredOutputs
from penstock.values import LARGEST_COUNT, LARGEST_ID, bare, flag, integer, items, plain, real, refused, text, token_ids

# A user's logits processor: (output token ids so far, float32 logits [vocab]) -> float32 logits [vocab].
# These are tensors, but this module does not import PyTorch.
LogitsProcessor = Callable[[Sequence[int], Any], Any]
# A user's score of a finished completion; higher is better.
RankFunction = Callable[[CompletionOutput], float]

RANKINGS = ("cumulative_logprob", "normalized_logprob", "consensus")
LARGEST_LENGTH = 2**63 - 1  # in tokens; the real limit is known when the request is admitted
FLOAT_MAX = sys.float_info.max
# Name, minimum, maximum, and the range in words.
_NUMBERS = (
    ("temperature", 0.0, FLOAT_MAX, "a finite number >= 0"),
    ("top_p", 0.0, 1.0, "above 0 and at most 1"),
    ("min_p", 0.0, 1.0, "between 0 and 1"),
    ("presence_penalty", -2.0, 2.0, "between -2 and 2"),
    ("frequency_penalty", -2.0, 2.0, "between -2 and 2"),
    ("repetition_penalty", 1e-3, 1e3, "a number from 0.001 to 1000"),
    ("length_penalty", -32.0, 32.0, "a number from -32 to 32"),
)
_FLAGS = (
    *("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"),
    *("spaces_between_special_tokens", "use_beam_search"),
)


class RequestPriority(IntEnum):
    """Higher is served first. A request never changes its class; waiting only moves it forward in the queue."""

    LOW = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4


class OutputKind(Enum):
    """The content of a streamed `RequestOutput`: all text so far, only the new text, or only the final result."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


_KINDS = tuple(kind.value for kind in OutputKind)


@values.suggests_keywords
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(processors.ProcessorParams):
    """How to choose the tokens of one request.

    `temperature=0` is greedy; `top_k` of 0 or -1, `top_p=1` and `min_p=0` are off. `max_tokens` counts new tokens; None
    means up to the model's limit. Presence and frequency penalties consider the output only, the repetition penalty
    prompt and output. `min_tokens` suppresses EOS, stop ids and stop strings until it is reached. `logprobs=k` returns
    the k most likely tokens and the chosen one; -1 returns the whole vocabulary. The same `seed` gives the same random
    numbers whatever else runs. `speculation_length` is the maximum number of draft tokens per step, limited by the
    engine's own setting (0: none; None: the engine's setting). It never changes the output, provided that
    `logits_processors` depend on their arguments only. A processor receives a copy of its row, on the thread that runs
    the model. An exception in it (`SystemExit` too) or an invalid return value ends its request; the time it takes
    delays every request in the step.

    Every number may be a Python int or float, or a numpy or torch scalar of the same kind, and is stored as an int or
    float; bools, `Decimal`s, NaN, infinity and numbers that no float can hold are refused. `repetition_penalty` ranges
    from 0.001 to 1000, `length_penalty` from -32 to 32; a `top_k` beyond the vocabulary keeps all of it. Lists and
    mappings are copied. Raises `RequestError` naming the invalid value.

    `n` completions share the K/V of their prompt, which is computed once. `best_of` (at least n) runs that many and
    returns the best n, best first, ranked by `rank_by`: "cumulative_logprob" (the default), "normalized_logprob"
    (divided by the number of tokens to the power of `length_penalty`), "consensus" (what agrees most with the other
    samples, from 0 to 1), or a function of a `CompletionOutput`. With `rank_by` and no `best_of`, the n completions are
    sorted. `use_beam_search` instead keeps the `best_of` (or n) most
    likely beams at every position, as `transformers` does with `num_beams`; `length_penalty` and `early_stopping`
    (True, False or "never") have the same meaning there. Ranked completions are delivered at the end.

    `structured_outputs` restricts the output to a schema, a regular expression, a choice or a grammar. EOS may then be
    drawn only where the output is complete; with `ignore_eos` only where nothing else may follow. With `reasoning_end`,
    for example "</think>", constraint and `stop` apply only to what comes after its first occurrence in the output.

    `is_ruled`, `num_held` and `is_cut` are derived: whether rules change the logits of every token, how many first
    tokens cannot be EOS, and whether sampling is restricted by more than top-k, top-p and min-p.
    """

    generates: ClassVar[bool] = True  # whether a request with such parameters makes new tokens
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
    rank_by: str | RankFunction | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    speculation_length: int | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning_end: str | None = None
    is_ruled: bool = field(init=False, repr=False, compare=False)
    num_held: int = field(init=False, repr=False, compare=False)
    is_cut: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in processors.normalized(self).items():
            _set(self, name, value)
        _check_numbers(self)
        _check_counts(self)
        _check_flags(self)
        _check_tokens(self)
        _check_stops(self)
        _check_ranking(self)
        _check_structure(self)
        _set(self, "is_ruled", _is_ruled(self))
        _set(self, "num_held", max(self.min_tokens, self.min_new_tokens))
        _set(self, "is_cut", processors.restricts_draws(self))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def num_samples(self) -> int:
        """The number of candidates: `best_of`, or `n`."""
        return self.best_of or self.n

    @property
    def num_sequences(self) -> int:
        """The number of sequences that run: one if all candidates would be identical."""
        are_identical = self.greedy and not self.logits_processors and not self.use_beam_search
        return 1 if are_identical else self.num_samples

    @property
    def num_texts(self) -> int:
        """The number of texts collected; for a beam search, only those that are returned."""
        return self.n if self.use_beam_search else self.num_sequences

    @property
    def num_beams(self) -> int:
        """The width of the beam search, or 0."""
        return self.num_samples if self.use_beam_search else 0

    @property
    def is_ranked(self) -> bool:
        """Whether completions are delivered best first, and therefore only at the end."""
        return self.num_samples > self.n or self.rank_by is not None or self.use_beam_search


def resolved(params: SamplingParams, max_tokens: int, bad_words: Sequence[Sequence[int]]) -> SamplingParams:
    """Parameters with a definite `max_tokens`, and with `bad_words` as token ids if there are any.

    The values were validated at construction; the caller checks what depends on model and engine. Raises
    `RequestError` if `min_tokens` exceeds `max_tokens`.
    """
    _require(params.min_tokens <= max_tokens, "min_tokens", params.min_tokens, f"at most max_tokens ({max_tokens})")
    if max_tokens == params.max_tokens and not bad_words:
        return params
    params = copy(params)
    _set(params, "max_tokens", max_tokens)
    if bad_words:
        _set(params, "bad_words", tuple(map(tuple, bad_words)))
    return params


def without_prompt_logprobs(params: SamplingParams) -> SamplingParams:
    """The parameters for a sibling of the sequence that scores the prompt."""
    if params.prompt_logprobs is None:
        return params
    params = copy(params)
    _set(params, "prompt_logprobs", None)
    return params


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


def _set(p: SamplingParams, name: str, value: object) -> None:
    """Replace a caller's value with its normalized form."""
    object.__setattr__(p, name, value)


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise refused(name, value, rule)


def _check_numbers(p: SamplingParams) -> None:
    """Convert every number to a float within its range."""
    _set(p, "top_p", 1.0 if p.top_p is None else p.top_p)
    for name, low, high, rule in _NUMBERS:
        _set(p, name, real(name, getattr(p, name), low, high, rule))
    _require(p.top_p > 0, "top_p", p.top_p, "above 0 and at most 1")


def _check_counts(p: SamplingParams) -> None:
    """Convert every count to an int within its range."""
    _set(p, "n", integer("n", p.n, 1, rule="an integer >= 1"))
    _set(p, "top_k", _top_k(p.top_k))
    _set(p, "min_tokens", integer("min_tokens", p.min_tokens, 0, LARGEST_LENGTH, "an integer >= 0"))
    for name, low, high, rule in (
        ("best_of", p.n, LARGEST_COUNT, f"an integer >= n ({p.n})"),
        ("max_tokens", 1, LARGEST_LENGTH, "an integer >= 1, or None for no limit"),
        ("logprobs", -1, LARGEST_COUNT, "None, -1 (all) or an integer >= 0"),
        ("prompt_logprobs", -1, LARGEST_COUNT, "None, -1 (all) or an integer >= 0"),
        ("speculation_length", 0, LARGEST_COUNT, "None or an integer >= 0"),
        ("seed", -(2**63), 2**64 - 1, "None or an integer of 64 bits"),
    ):
        value = getattr(p, name)
        if name.endswith("logprobs") and isinstance(value, bool):
            value = 0 if value else None  # `logprobs=True` is the OpenAI API's form of "only the chosen token"
        _set(p, name, None if value is None else integer(name, value, low, high, rule))
    if p.max_tokens is not None:
        _require(p.min_tokens <= p.max_tokens, "min_tokens", p.min_tokens, f"at most max_tokens ({p.max_tokens})")


def _top_k(value: object) -> int:
    """0 is off; a number beyond any vocabulary keeps all of it, as `sys.maxsize` does elsewhere."""
    if value is None:
        return 0
    value = plain(value)
    if isinstance(value, int) and int.__index__(value) > LARGEST_COUNT:
        return LARGEST_COUNT
    return max(0, integer("top_k", value, -1, rule="an integer >= 0 (0 or -1 turns it off)"))


def _check_flags(p: SamplingParams) -> None:
    for name in _FLAGS:
        _set(p, name, flag(name, getattr(p, name)))
    kind = bare(p.output_kind)
    is_known = isinstance(kind, OutputKind) or (isinstance(kind, str) and kind in _KINDS)
    _require(is_known, "output_kind", kind, f"an OutputKind or one of {', '.join(map(repr, _KINDS))}")
    _set(p, "output_kind", OutputKind(kind))


def _check_tokens(p: SamplingParams) -> None:
    """Convert token ids to tuples and a dict of ints; check that processors are callable."""
    if p.allowed_token_ids is not None:
        _set(p, "allowed_token_ids", token_ids("allowed_token_ids", p.allowed_token_ids))
        _require(len(p.allowed_token_ids) > 0, "allowed_token_ids", (), "a non-empty list of token ids, or None")
    if p.logit_bias is not None:
        _require(isinstance(p.logit_bias, Mapping), "logit_bias", p.logit_bias, "a mapping of token ids")
        _set(p, "logit_bias", dict(_bias_entry(*pair) for pair in items("logit_bias", p.logit_bias.items())))
    words = items("bad_words", p.bad_words)
    _set(p, "bad_words", tuple(_word(word) for word in words))
    _set(p, "logits_processors", items("logits_processors", p.logits_processors))
    _require(all(map(callable, p.logits_processors)), "logits_processors", p.logits_processors, "callables")


def _bias_entry(token: object, bias: object) -> tuple[int, float]:
    rule = "token ids with finite numbers"
    return (
        integer("each key of logit_bias", token, 0, LARGEST_ID, rule),
        real("each value of logit_bias", bias, -FLOAT_MAX, FLOAT_MAX, rule),
    )


def _word(word: object) -> str | tuple[int, ...]:
    plain_word = text("bad_words", word) if isinstance(word, str) else token_ids("bad_words", word)
    _require(len(plain_word) > 0, "bad_words", word, "non-empty strings or token id lists")
    return plain_word


def _check_stops(p: SamplingParams) -> None:
    stops = tuple(map(bare, (p.stop,) if isinstance(p.stop, str) else items("stop", p.stop)))
    _require(all(isinstance(stop, str) and len(stop) > 0 for stop in stops), "stop", p.stop, "non-empty strings")
    _set(p, "stop", stops)
    _set(p, "stop_token_ids", token_ids("stop_token_ids", p.stop_token_ids))
    _require(p.detokenize or not stops, "stop", p.stop, "empty when detokenize=False: stop strings need text")


def _check_ranking(p: SamplingParams) -> None:
    _set(p, "rank_by", bare(p.rank_by))
    is_named = isinstance(p.rank_by, str) and p.rank_by in RANKINGS
    is_known = p.rank_by is None or is_named or callable(p.rank_by)
    _require(is_known, "rank_by", p.rank_by, f"a function of a completion, or one of {', '.join(map(repr, RANKINGS))}")
    stopping = plain(bare(p.early_stopping))
    is_known = isinstance(stopping, bool) or (isinstance(stopping, str) and stopping == "never")
    _require(is_known, "early_stopping", p.early_stopping, 'True, False or "never"')
    _set(p, "early_stopping", stopping)
    if p.use_beam_search:
        _require(p.num_samples > 1, "best_of", p.best_of, "the width of the beam search, at least 2")
        _require(p.temperature == 0, "temperature", p.temperature, "0 with use_beam_search, which draws nothing")
        _require(p.rank_by is None, "rank_by", p.rank_by, "None with use_beam_search, which ranks by its own scores")


def _check_structure(p: SamplingParams) -> None:
    structured, marker = p.structured_outputs, bare(p.reasoning_end)
    is_known = structured is None or isinstance(structured, StructuredOutputs)
    _require(is_known, "structured_outputs", structured, "StructuredOutputs or None")
    if structured is not None:
        _require(not p.use_beam_search, "structured_outputs", structured, "None with use_beam_search")
    if marker is not None:
        _require(isinstance(marker, str) and len(marker) > 0, "reasoning_end", marker, "None or a non-empty string")
        _set(p, "reasoning_end", marker)
        _require(not p.use_beam_search, "reasoning_end", marker, "None with use_beam_search")
        _require(p.detokenize, "reasoning_end", marker, "None when detokenize=False: it is looked for in the text")

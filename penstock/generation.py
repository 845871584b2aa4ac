"""`GenerationConfig`: the parameter names of `transformers`, translated into `SamplingParams`; and a model's defaults.

Owns the translation, and how many tokens a request may generate after its prompt (`fitted`). Built by callers; every
engine that encodes prompts calls `fitted`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.errors import RequestError, RequestTooLarge
from penstock.sampling import LARGEST_LENGTH, SamplingParams
from penstock.scoring import ScoringParams
from penstock.values import bare, flag, integer, plain, refused, suggests_keywords, token_ids


@suggests_keywords
@dataclass(slots=True, kw_only=True)
class GenerationConfig:
    """The vocabulary of `transformers`-style callers; `sampling_params()` translates it.

    `max_length` counts new tokens unless `length_mode="total"`, and is cut to what fits; a prompt that leaves no
    room raises `RequestTooLarge`. `do_sample=False` is greedy whatever the temperature; with `num_beams` above 1 it is
    a beam search. `pad_token_id` and `use_cache` are accepted because callers carry them; rows are never padded and
    the K/V cache is always used.
    """

    max_length: int = 512
    length_mode: str = "new"
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 0.9
    repetition_penalty: float = 1.0
    do_sample: bool = True
    early_stopping: bool | str = True
    min_length: int = 0
    length_penalty: float = 1.0
    num_beams: int = 1
    num_return_sequences: int = 1
    pad_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    use_cache: bool = True
    seed: int | None = None
    stop: str | Sequence[str] | None = field(default=())

    def __post_init__(self) -> None:
        self.sampling_params()  # refuses bad values here, where the caller wrote them

    def sampling_params(self, prompt_len: int = 0, room: int | None = None) -> SamplingParams:
        """The `SamplingParams` that mean the same, with `max_length` cut to `room` (new tokens that still fit).

        Raises `RequestTooLarge` when a prompt of `prompt_len` tokens uses up `max_length`.
        """
        max_tokens = self._max_tokens(prompt_len, room)
        num_beams = integer("num_beams", self.num_beams, 1, rule="an integer >= 1")
        do_sample = flag("do_sample", self.do_sample)
        if num_beams > 1 and do_sample:
            text = f"num_beams={num_beams} searches and draws nothing: set do_sample=False with it"
            raise RequestError(text, parameter="num_beams")
        min_tokens = integer("min_length", self.min_length, 0, LARGEST_LENGTH, "an integer >= 0")
        params = SamplingParams(
            n=self.num_return_sequences,
            best_of=num_beams if num_beams > 1 else None,
            use_beam_search=num_beams > 1,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            temperature=self.temperature if do_sample else 0.0,
            top_k=0 if self.top_k is None else self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=self.repetition_penalty,
            min_tokens=min(min_tokens, max_tokens),
            max_tokens=max_tokens,
            stop=self.stop,
            stop_token_ids=self._stop_ids(),
            seed=self.seed,
        )
        return params if do_sample else replace(params, top_k=0, top_p=1.0)

    def _max_tokens(self, prompt_len: int, room: int | None) -> int:
        max_length = integer("max_length", self.max_length, 1, LARGEST_LENGTH, "an integer >= 1")
        max_tokens = max_length - (prompt_len if self._counts_prompt() else 0)
        if prompt_len and max_tokens < 1:
            raise RequestTooLarge(
                f"the prompt has {prompt_len} tokens and max_length={max_length} leaves no room for output: "
                'raise max_length, or count new tokens only with length_mode="new"',
                parameter="max_length",
            )
        return max_tokens if room is None else min(max_tokens, room)

    def _counts_prompt(self) -> bool:
        mode = bare(self.length_mode)
        if isinstance(mode, str) and mode in ("new", "total"):
            return mode == "total"
        raise refused("length_mode", self.length_mode, '"new" or "total"')

    def _stop_ids(self) -> Sequence[int]:
        eos = plain(self.eos_token_id)
        return token_ids("eos_token_id", (eos,) if isinstance(eos, int) else eos)


# What a request may bring; None for the model's own defaults.
Params = SamplingParams | GenerationConfig | None


def default_params(defaults: Mapping[str, Any], max_tokens: int, prompt_len: int | None = None) -> SamplingParams:
    """A model's own defaults (see `ModelSpec`), with `max_tokens` where they do not limit the length.

    Its `max_length` and `min_length` include a prompt of `prompt_len` tokens; a prompt that already reaches them makes
    them void.
    """
    values = dict(defaults)
    max_length, min_length = values.pop("max_length", None), values.pop("min_length", 0)
    if prompt_len is not None:
        if max_length is not None and max_length > prompt_len:
            max_tokens = max_length - prompt_len
        values.setdefault("min_new_tokens", max(0, min_length - prompt_len))
    return SamplingParams(**{"max_tokens": max_tokens} | values)


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """The most tokens of prompt and output together; what errors call it, and what they hint at."""

    tokens: int
    name: str = "limit"
    hint: str = ""


def fitted(
    params: Params, prompt_len: int, limit: LengthLimit, defaults: Mapping[str, Any], max_tokens: int
) -> tuple[SamplingParams, int]:
    """The parameters of a request after a prompt of `prompt_len` tokens, and how many tokens it may generate.

    What a caller did not ask for is cut to what fits: the model's own `defaults` (with `max_tokens`, see
    `default_params`), the `max_length` of a `GenerationConfig`, and `max_tokens` of None. Raises `RequestTooLarge`.
    """
    room = limit.tokens - prompt_len
    if room < (0 if isinstance(params, SamplingParams) and not params.generates else 1):
        subject = "prompt and completion have" if isinstance(params, ScoringParams) else "the prompt has"
        raise RequestTooLarge(
            f"{subject} {prompt_len} tokens and the {limit.name} is {limit.tokens} for prompt and output together: "
            "shorten the prompt",
            parameter="prompt",
        ).with_hint(limit.hint)
    if params is None:
        params = default_params(defaults, max_tokens, prompt_len)
        return params, min(room, params.max_tokens or room)
    if isinstance(params, ScoringParams):
        room += params.num_scored  # which a request with these parameters could have generated
        return params, min(room, params.max_tokens or room)
    if isinstance(params, GenerationConfig):
        params = params.sampling_params(prompt_len, room)
    if params.max_tokens is not None and params.max_tokens > room:
        raise RequestTooLarge(
            f"a prompt of {prompt_len} tokens and max_tokens={params.max_tokens} exceed the {limit.name} of "
            f"{limit.tokens}: ask for at most {room}, or max_tokens=None for what fits",
            parameter="max_tokens",
        ).with_hint(limit.hint)
    return params, room if params.max_tokens is None else params.max_tokens

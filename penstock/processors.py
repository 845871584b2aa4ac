"""`ProcessorParams`: the part of `SamplingParams` that is named after transformers' logits processors and warpers.

Owns their names, ranges and defaults, which are those of transformers' `GenerationConfig`. Never looks at tokens or
tensors. `SamplingParams` inherits them; `models/processor_rules.py` and `models/filters.py` apply them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from penstock.values import LARGEST_COUNT, LARGEST_ID, flag, integer, items, plain, real, refused, token_ids

_ABOVE_0, _BELOW_1 = sys.float_info.min, math.nextafter(1.0, 0.0)
_SHARE = "above 0 and at most 1"
_CUTOFF = "at least 0 and below 1 (0 is off)"
_SIZE = "an integer >= 0 (0 is off)"
_BOS = "None or a token id"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorParams:
    """The logits processors of `transformers` that have no other name in `SamplingParams`.

    `suppress_tokens` are never drawn, `begin_suppress_tokens` not as the first token. `min_new_tokens` rules out EOS
    before that many new tokens; unlike with `min_tokens`, stop ids and stop strings may end the text earlier.
    `no_repeat_ngram_size` (0 is off) lets no n-gram of that size occur twice, prompt included. `sequence_bias` maps
    sequences of ids to biases: each is added to the logit of its sequence's last token where the other tokens precede.
    `exponential_decay_length_penalty` (start, factor) raises EOS exponentially after `start` new tokens.
    `forced_bos_token_id` follows a prompt of a single token, `forced_eos_token_id` (an id or several) is the last
    token that `max_tokens` allows; only `suppress_tokens` and `logits_processors` override them. `renormalize_logits`
    turns what the rules leave into log probabilities again; it has an effect in a beam search only.

    The others restrict draws, after temperature: `top_h` before top-k, then, after min-p, `typical_p`, `epsilon_cutoff`
    and `eta_cutoff`; None, 1, 0 and 0 are off. See transformers' classes of the same names for what they compute.
    """

    suppress_tokens: Sequence[int] | None = ()
    begin_suppress_tokens: Sequence[int] | None = ()
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    renormalize_logits: bool = False
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0


P = TypeVar("P", bound=ProcessorParams)


def normalized(p: ProcessorParams) -> dict[str, object]:
    """Every value as plain Python, in one form. Raises `RequestError` for a bad one."""
    bos, top_h = p.forced_bos_token_id, p.top_h
    return {
        "suppress_tokens": token_ids("suppress_tokens", p.suppress_tokens),
        "begin_suppress_tokens": token_ids("begin_suppress_tokens", p.begin_suppress_tokens),
        "min_new_tokens": integer("min_new_tokens", p.min_new_tokens, 0, rule="an integer >= 0"),
        "no_repeat_ngram_size": integer("no_repeat_ngram_size", p.no_repeat_ngram_size, 0, rule=_SIZE),
        "sequence_bias": None if p.sequence_bias is None else _biases(p.sequence_bias),
        "exponential_decay_length_penalty": _decay(p.exponential_decay_length_penalty),
        "forced_bos_token_id": None if bos is None else integer("forced_bos_token_id", bos, 0, LARGEST_ID, _BOS),
        "forced_eos_token_id": _forced_eos(p.forced_eos_token_id),
        "renormalize_logits": flag("renormalize_logits", p.renormalize_logits),
        "top_h": None if top_h is None else real("top_h", top_h, _ABOVE_0, 1.0, f"None, or {_SHARE}"),
        "typical_p": real("typical_p", p.typical_p, _ABOVE_0, 1.0, _SHARE),
        "epsilon_cutoff": real("epsilon_cutoff", p.epsilon_cutoff, 0.0, _BELOW_1, _CUTOFF),
        "eta_cutoff": real("eta_cutoff", p.eta_cutoff, 0.0, _BELOW_1, _CUTOFF),
    }


def changes_logits(p: ProcessorParams) -> bool:
    """Whether any of these changes logits before every draw."""
    return bool(
        p.suppress_tokens
        or p.begin_suppress_tokens
        or p.no_repeat_ngram_size
        or p.sequence_bias
        or p.exponential_decay_length_penalty
        or p.forced_bos_token_id is not None
        or p.forced_eos_token_id is not None
    )


def restricts_draws(p: ProcessorParams) -> bool:
    """Whether any of these keeps tokens out of a draw."""
    return p.top_h is not None or p.typical_p < 1 or p.epsilon_cutoff > 0 or p.eta_cutoff > 0


def params_after(p: P, num_tokens: int) -> P:
    """The parameters for the text that follows `num_tokens` new tokens."""
    decay = p.exponential_decay_length_penalty
    return replace(
        p,
        min_new_tokens=max(0, p.min_new_tokens - num_tokens),
        begin_suppress_tokens=() if num_tokens else p.begin_suppress_tokens,
        exponential_decay_length_penalty=None if decay is None else (decay[0] - num_tokens, decay[1]),
    )


def _forced_eos(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = plain(value)
    eos = token_ids("forced_eos_token_id", (ids,) if isinstance(ids, int) else ids)
    if not eos:
        raise refused("forced_eos_token_id", value, "None, a token id or several")
    return eos


def _decay(value: object) -> tuple[int, float] | None:
    rule = "None, or (start in new tokens, factor above 0)"
    if value is None:
        return None
    pair = items("exponential_decay_length_penalty", value)
    if len(pair) != 2:
        raise refused("exponential_decay_length_penalty", value, rule)
    start = integer("exponential_decay_length_penalty", pair[0], -LARGEST_COUNT, rule=rule)
    return start, real("exponential_decay_length_penalty", pair[1], _ABOVE_0, sys.float_info.max, rule)


def _biases(value: object) -> dict[tuple[int, ...], float]:
    """From a mapping of id sequences, or from a list of [ids, bias] as in transformers."""
    rule = "a mapping of non-empty sequences of token ids to numbers, or a list of [ids, number]"
    try:
        pairs = [tuple(pair) for pair in (dict(value).items() if isinstance(value, Mapping) else items("", value))]
    except Exception:
        raise refused("sequence_bias", value, rule) from None
    biases: dict[tuple[int, ...], float] = {}
    for pair in pairs:
        if len(pair) != 2 or not (ids := token_ids("sequence_bias", pair[0])):
            raise refused("sequence_bias", value, rule)
        biases[ids] = real("sequence_bias", pair[1], -math.inf, math.inf, rule)
    return biases

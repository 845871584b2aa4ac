"""`ProcessorParams`: the part of `SamplingParams` that is named after transformers' logits processors and warpers.

Owns their names, ranges and defaults, which are those of transformers' `GenerationConfig`. Never looks at tokens or
tensors. `SamplingParams` inherits them; `models/processors.py` and `models/cutoffs.py` apply them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from penstock.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorParams:
    """What `transformers` can do to logits, as far as it is not named otherwise here.

    `suppress_tokens` are never drawn, `begin_suppress_tokens` not as the first token. `min_new_tokens` rules out EOS
    until there are so many; unlike with `min_tokens`, stop ids and stop strings may end it. `no_repeat_ngram_size`
    (0 is off) lets no run of so many tokens occur twice, prompt included. `sequence_bias` adds its values to the logits
    of the last tokens of sequences of ids where the others precede. `exponential_decay_length_penalty` (start, factor)
    raises EOS more and more from `start` new tokens on. `forced_bos_token_id` is what follows a prompt of a single
    token, `forced_eos_token_id` (an id or several) is the last token that `max_tokens` allows; only `suppress_tokens`
    and `logits_processors` stand above them. `renormalize_logits` makes log probabilities of what the rules leave in a
    beam search; nothing else depends on it.

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


def normalized(p: ProcessorParams) -> dict[str, Any]:
    """The values that come in several forms, each in one: tuples of ids, a dictionary of biases."""
    forced = p.forced_eos_token_id
    return {
        "suppress_tokens": _ids("suppress_tokens", p.suppress_tokens),
        "begin_suppress_tokens": _ids("begin_suppress_tokens", p.begin_suppress_tokens),
        "forced_eos_token_id": None if forced is None else _ids("forced_eos_token_id", forced),
        "sequence_bias": None if p.sequence_bias is None else _biases(p.sequence_bias),
    }


def changes_logits(p: ProcessorParams) -> bool:
    """Whether any of these is a rule for the logits of every token."""
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
    """Whether any of these leaves tokens out of a draw."""
    return p.top_h is not None or p.typical_p < 1 or p.epsilon_cutoff > 0 or p.eta_cutoff > 0


def after(p: P, num_tokens: int) -> P:
    """The parameters of what follows behind so many new tokens."""
    decay = p.exponential_decay_length_penalty
    return replace(
        p,
        min_new_tokens=max(0, p.min_new_tokens - num_tokens),
        begin_suppress_tokens=() if num_tokens else p.begin_suppress_tokens,
        exponential_decay_length_penalty=None if decay is None else (decay[0] - num_tokens, decay[1]),
    )


def check(p: ProcessorParams) -> None:
    """Raises `RequestError` for a value that means nothing."""
    for name, rule in (("min_new_tokens", ""), ("no_repeat_ngram_size", " (0 is off)")):
        _need(_is_count(getattr(p, name)), name, getattr(p, name), f"an integer >= 0{rule}")
    _need(
        p.forced_bos_token_id is None or _is_count(p.forced_bos_token_id),
        "forced_bos_token_id",
        p.forced_bos_token_id,
        "None or a token id",
    )
    _need(p.forced_eos_token_id != (), "forced_eos_token_id", p.forced_eos_token_id, "None, a token id or several")
    _need(isinstance(p.renormalize_logits, bool), "renormalize_logits", p.renormalize_logits, "True or False")
    _need(
        p.top_h is None or (_is_finite(p.top_h) and 0 < p.top_h <= 1),
        "top_h",
        p.top_h,
        "None, or above 0 and at most 1",
    )
    _need(_is_finite(p.typical_p) and 0 < p.typical_p <= 1, "typical_p", p.typical_p, "above 0 and at most 1")
    for name in ("epsilon_cutoff", "eta_cutoff"):
        value = getattr(p, name)
        _need(_is_finite(value) and 0 <= value < 1, name, value, "at least 0 and below 1 (0 is off)")
    _check_decay(p.exponential_decay_length_penalty)


def _check_decay(decay: Any) -> None:
    is_pair = decay is None or (isinstance(decay, Sequence) and len(decay) == 2)
    ok = decay is None or (is_pair and _is_int(decay[0]) and _is_finite(decay[1]) and decay[1] > 0)
    rule = "None, or (start in new tokens, factor above 0)"
    _need(ok and (decay is None or abs(decay[0]) < 2**31), "exponential_decay_length_penalty", decay, rule)


def _biases(value: Any) -> dict[tuple[int, ...], float]:
    """From a mapping of id sequences, or, as transformers has it, a list of [ids, bias]."""
    rule = "a mapping of non-empty sequences of token ids to numbers, or a list of [ids, number]"
    try:
        pairs = [(tuple(ids), bias) for ids, bias in (value.items() if isinstance(value, Mapping) else value)]
    except (TypeError, ValueError):
        raise RequestError(f"sequence_bias must be {rule}, got {value!r}") from None
    for ids, bias in pairs:
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool) and _fits(bias)
        _need(bool(ids) and all(map(_is_count, ids)) and is_number, "sequence_bias", {ids: bias}, rule)
    return {ids: float(bias) for ids, bias in pairs}


def _ids(name: str, value: Any) -> tuple[int, ...]:
    try:
        ids = (value,) if isinstance(value, int) else tuple(value or ())
    except TypeError:
        raise RequestError(f"{name} must be token ids, got {value!r}") from None
    _need(all(map(_is_count, ids)), name, value, "token ids, which are integers >= 0")
    return ids


def _need(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise RequestError(f"{name} must be {rule}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _fits(value) and math.isfinite(value)


def _fits(value: float) -> bool:
    """Whether a float can hold it, and it is a number."""
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False

"""The parameters of `InferenceModule.generate`, translated into `SamplingParams`.

Owns names and rules only. Called by the backends and by `InferenceModule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from penstock.sampling import SamplingParams
from penstock.values import flag, nearest, plain

# Keywords that `Engine.generate` takes, all others being fields of `SamplingParams`.
ENGINE_OPTIONS = frozenset({"priority", "deadline", "ttft_deadline", "namespace", "adapter"})
_OTHER_NAMES = {"max_tokens": "max_new_tokens", "n": "num_return_sequences"}  # of `SamplingParams`
_NAMES = frozenset(
    {
        *("use_cache", "do_sample", "return_logits", "return_logprobs", *_OTHER_NAMES.values()),
        *ENGINE_OPTIONS,
        *(field.name for field in fields_of(SamplingParams) if field.init),
    }
).difference(_OTHER_NAMES)
_SEEDS = 1 << 64


def sampling_params(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    do_sample: bool,
    num_return_sequences: int,
    **fields: Any,
) -> SamplingParams:
    """The same parameters under this engine's names. `do_sample=False` is greedy, whatever the temperature.

    Raises `RequestError` for values, and `TypeError` for unknown names.
    """
    if given := _OTHER_NAMES.keys() & fields.keys():
        name = min(given)
        raise TypeError(f"generate has no parameter {name!r}: its name is {_OTHER_NAMES[name]!r}")
    if unknown := fields.keys() - _NAMES:
        raise TypeError(f"generate has no parameter {min(unknown)!r}{nearest(min(unknown), _NAMES)}")
    is_sampled = flag("do_sample", do_sample)
    return SamplingParams(
        max_tokens=max_new_tokens,
        temperature=temperature if is_sampled else 0.0,
        top_p=top_p if is_sampled else 1.0,
        top_k=top_k if is_sampled else 0,
        n=num_return_sequences,
        **fields,
    )


def seeded(params: SamplingParams, ordinal: int) -> SamplingParams:
    """The parameters for the prompt with so many equal ones before it in the same call: with a seed of its own."""
    if params.seed is None or ordinal == 0:
        return params
    return replace(params, seed=(params.seed + ordinal) % _SEEDS)


def is_repeatable(options: Mapping[str, Any]) -> bool:
    """Whether the same call gives the same result again: it is greedy or seeded."""
    is_greedy = plain(options.get("temperature", 1.0)) == 0 or plain(options.get("top_k")) == 1
    return is_greedy or not options.get("do_sample", True) or options.get("seed") is not None

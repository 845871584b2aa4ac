"""How many tokens a sequence of a model may have, why not more, and what to change for more: `length_limit`.

Knows position embeddings: tables of a fixed size, rotary frequencies and how they are scaled. Reads the config alone.
Called by `loading`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

NO_LIMIT = 2**31 - 1
# Kinds of rotary frequencies that are the same for texts of any length, and stretched to `factor` times a length:
# that of the config, or one that comes with the kind.
_STRETCHED = frozenset({"linear", "proportional"})
_STRETCHED_FROM_ORIGINAL = frozenset({"yarn", "llama3"})

_DEPENDS_ON_LONGEST = (
    "beyond {} tokens the model's rotary frequencies depend on the longest text of a step, so that requests would "
    "change each other's output."
)
_USE_YARN = (
    "Fixed ones hold for longer texts: in rope_parameters of config.json set rope_type to yarn and "
    "original_max_position_embeddings to {}"
)
_USE_LONG_FACTOR = (
    "Those of long texts can serve all: in rope_parameters of config.json set short_factor to what long_factor is; "
    "then {} tokens are possible"
)
_STRETCH = (
    "the model's config has max_position_embeddings={0}. Positions can be stretched: in rope_parameters of config.json "
    "set rope_type to yarn, original_max_position_embeddings to {0}, and factor to how many times as long texts may be"
)
_STRETCHED_TO = (
    "the model's rotary positions are stretched to {} tokens; a larger factor in rope_parameters of config.json allows "
    "more"
)


class LengthLimit(NamedTuple):
    """`tokens` of prompt and output together; `reason` says why not more, and the remedy."""

    tokens: int
    reason: str


def length_limit(config: object) -> LengthLimit:
    """The limit that a transformers text config sets: its `max_position_embeddings`, or what its rotary positions hold.

    As in vLLM, positions of the kinds linear, yarn, llama3 and proportional hold up to `factor` times the original
    length, and further where `max_position_embeddings` says so. "dynamic" and "longrope" choose their frequencies by
    the longest position of a forward pass, which several requests share: their limit is where one request would begin
    to change another.
    """
    table_size = _table_size(config)
    parameters: Mapping[str, object] = getattr(config, "rope_parameters", None) or {}
    if not parameters:
        return LengthLimit(table_size, f"the model's position embeddings end at {table_size} tokens: use another model")
    if "rope_type" in parameters:
        return _limit_of(parameters, table_size)
    # One entry per kind of layer. In layers with a sliding window, positions beyond the window do not matter; what the
    # config says of all layers together includes the stretching.
    kinds = {name: kind for name, kind in parameters.items() if isinstance(kind, Mapping)}
    limits = [
        _limit_of(kind, table_size) for kind in kinds.values() if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    full = [kind for name, kind in kinds.items() if "sliding" not in name]
    if full and all(kind.get("rope_type") in _STRETCHED_FROM_ORIGINAL for kind in full):
        limits += [_limit_of(kind, table_size) for kind in full]
    else:
        limits.append(_limit_of({}, table_size))
    return min(limits, key=lambda limit: limit.tokens)


def _limit_of(parameters: Mapping[str, object], table_size: int) -> LengthLimit:
    """The limit of one kind of rotary frequencies."""
    kind = parameters.get("rope_type", "default")
    original = _length(parameters.get("original_max_position_embeddings"), table_size)
    if kind == "dynamic":
        return LengthLimit(table_size, f"{_DEPENDS_ON_LONGEST.format(table_size)} {_USE_YARN.format(table_size)}")
    if kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor"):
        limit = min(table_size, original)
        return LengthLimit(limit, f"{_DEPENDS_ON_LONGEST.format(limit)} {_USE_LONG_FACTOR.format(table_size)}")
    if kind not in _STRETCHED and kind not in _STRETCHED_FROM_ORIGINAL:
        return LengthLimit(table_size, _STRETCH.format(table_size))
    base = table_size if kind in _STRETCHED else original
    tokens = min(max(table_size, int(_factor(parameters.get("factor")) * base)), NO_LIMIT)
    return LengthLimit(tokens, _STRETCHED_TO.format(tokens))


def _table_size(config: object) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return NO_LIMIT


def _factor(value: object) -> float:
    """A factor from a config that may have been written by hand."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 1.0


def _length(value: object, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default

"""How many tokens a sequence of a model may have, why not more, and what to change for more: `length_limit`.

Owns what is known of position embeddings: tables of a fixed size, rotary frequencies and how they are scaled. Looks at
the config alone. Called by `loading`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

NO_LIMIT = 2**31 - 1
# Kinds of rotary frequencies that are the same for texts of any length, and stretched to `factor` times a length:
# that of the config, or one that comes with the kind.
_STRETCHED = frozenset({"linear", "proportional"})
_STRETCHED_FROM_ORIGINAL = frozenset({"yarn", "llama3"})

_FOLLOWS = (
    "beyond {} tokens the model's rotary frequencies follow the longest text of a step, so that requests would change "
    "each other's output."
)
_FIXED_BY_YARN = (
    "Fixed ones hold for longer texts: in rope_parameters of config.json set rope_type to yarn and "
    "original_max_position_embeddings to {}"
)
_FIXED_BY_LONG = (
    "Those of long texts can serve all: in rope_parameters of config.json set short_factor to what long_factor is; "
    "then {} tokens are possible"
)
_STRETCH = (
    "the model's config has max_position_embeddings={0}. Positions can be stretched: in rope_parameters of config.json "
    "set rope_type to yarn, original_max_position_embeddings to {0}, and factor to how many times as long texts may be"
)
_STRETCHED_TO = (
    "the model's rotary positions are stretched to {} tokens; a larger factor in rope_parameters of config.json holds "
    "for more"
)


class LengthLimit(NamedTuple):
    """`tokens` of prompt and output together; `reason` says why not more, and the remedy."""

    tokens: int
    reason: str


def length_limit(config: Any) -> LengthLimit:
    """The limit that a transformers text config sets: its `max_position_embeddings`, or what its rotary positions hold.

    As in vLLM, positions of the kinds linear, yarn, llama3 and proportional hold up to `factor` times the original
    length, and further where `max_position_embeddings` says so. "dynamic" and "longrope" choose their frequencies by
    the longest position of a forward pass, in which requests share: they end where neighbours would begin to matter.
    """
    table = _table(config)
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    if not parameters:
        return LengthLimit(table, f"the model's position embeddings end at {table} tokens: use another one")
    if "rope_type" in parameters:
        return _of_kind(parameters, table)
    # By kind of layer. Where layers slide, positions beyond the window do not matter; what the config says of all
    # layers together includes the stretching.
    kinds = {name: kind for name, kind in parameters.items() if isinstance(kind, Mapping)}
    limits = [_of_kind(kind, table) for kind in kinds.values() if kind.get("rope_type") in ("dynamic", "longrope")]
    full = [kind for name, kind in kinds.items() if "sliding" not in name]
    yarn = all(kind.get("rope_type") in _STRETCHED_FROM_ORIGINAL for kind in full) and full
    limits += [_of_kind(kind, table) for kind in full] if yarn else [_of_kind({}, table)]
    return min(limits, key=lambda limit: limit.tokens)


def _of_kind(parameters: Mapping[str, Any], table: int) -> LengthLimit:
    kind = parameters.get("rope_type", "default")
    original = _length(parameters.get("original_max_position_embeddings"), table)
    if kind == "dynamic":
        return LengthLimit(table, f"{_FOLLOWS.format(table)} {_FIXED_BY_YARN.format(table)}")
    if kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor"):
        limit = min(table, original)
        return LengthLimit(limit, f"{_FOLLOWS.format(limit)} {_FIXED_BY_LONG.format(table)}")
    if kind not in _STRETCHED and kind not in _STRETCHED_FROM_ORIGINAL:
        return LengthLimit(table, _STRETCH.format(table))
    base = table if kind in _STRETCHED else original
    tokens = min(max(table, int(_positive(parameters.get("factor")) * base)), NO_LIMIT)
    return LengthLimit(tokens, _STRETCHED_TO.format(tokens))


def _table(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return NO_LIMIT


def _positive(value: Any) -> float:
    """A factor of a config that somebody may have written by hand."""
    sane = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return float(value) if sane else 1.0


def _length(value: Any, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default

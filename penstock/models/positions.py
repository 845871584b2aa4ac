"""How many tokens a sequence of a model may have: `max_length`, from its config.

Owns what is known of position embeddings: tables of a fixed size, rotary frequencies and how they are scaled. Looks at
the config alone. Called by `loading`.
"""

from __future__ import annotations

from typing import Any

NO_LIMIT = 2**31 - 1


def max_length(config: Any) -> int:
    """The most tokens of one sequence, prompt and output together, by a transformers text config."""
    return min(_position_limit(config), _rope_limit(config))


def _rope_limit(config: Any) -> int:
    """Up to where rotary frequencies are the same for everybody.

    "longrope" chooses them by the longest position of a forward pass, in which requests share: beyond the original
    length a neighbour would change a request's output. "dynamic" does so beyond the length that holds anyway.
    """
    found: Any = getattr(config, "rope_parameters", None) or {}
    kinds = [found] if "rope_type" in found else [value for value in found.values() if isinstance(value, dict)]
    long = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((int(kind["original_max_position_embeddings"]) for kind in long), default=NO_LIMIT)


def _position_limit(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return NO_LIMIT

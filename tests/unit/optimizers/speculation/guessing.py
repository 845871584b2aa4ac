"""Sequences and asks by hand, for the tests of drafters and of their controller."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from penstock.optimizers.speculation.drafter import NUM_KINDS, Ask, Draft, Drafter
from penstock.sampling import SamplingParams
from penstock.sequence import Sequence

HOPEFUL = (0.9,) * NUM_KINDS


def sequence(
    number: int, prompt: SequenceOf[int], said: SequenceOf[int] = (), new: int = 100, **fields: Any
) -> Sequence:
    """A sequence that has said something already."""
    params = fields.pop("params", None) or SamplingParams(max_tokens=new)
    seq = Sequence(
        id=number, request_id=str(number), params=params, tokens=list(prompt), max_len=len(prompt) + new, **fields
    )
    seq.tokens.extend(said)
    return seq


def propose(drafter: Drafter, seq: Sequence, most: int = 4, least: float = 0.0) -> Draft:
    """The draft for one sequence."""
    (draft,) = drafter.propose([Ask(seq, most, HOPEFUL, least)])
    return draft

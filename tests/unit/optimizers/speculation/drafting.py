"""Sequences and requests by hand, for the tests of drafters and of their controller."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from penstock.optimizers.speculation.drafter import NUM_CONFIDENCE_LEVELS, Draft, Drafter, DraftRequest
from penstock.sampling import SamplingParams
from penstock.sequence import Sequence

HIGH_RATES = (0.9,) * NUM_CONFIDENCE_LEVELS


def sequence(
    number: int, prompt: SequenceOf[int], output: SequenceOf[int] = (), max_tokens: int = 100, **fields: Any
) -> Sequence:
    """A sequence with some output."""
    params = fields.pop("params", None) or SamplingParams(max_tokens=max_tokens)
    seq = Sequence(
        id=number,
        request_id=str(number),
        params=params,
        tokens=list(prompt),
        max_len=len(prompt) + max_tokens,
        **fields,
    )
    seq.tokens.extend(output)
    return seq


def propose(drafter: Drafter, seq: Sequence, max_tokens: int = 4, min_acceptance: float = 0.0) -> Draft:
    """The draft for one sequence."""
    (draft,) = drafter.propose([DraftRequest(seq, max_tokens, HIGH_RATES, min_acceptance)])
    return draft

"""What a step's sampled tokens mean for a sequence: how many of them count, and whether it ends with the last one.

Advances the sequence's constraint, which `Scheduler.commit` alone may do; writes nothing else. Called by it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from penstock.errors import GrammarError
from penstock.sequence import FinishReason, Sequence


class Accepted(NamedTuple):
    """`num_tokens` of the tokens count; the sequence ends with the last of these if there is a `reason`."""

    num_tokens: int
    reason: FinishReason | None = None
    stop_token: int | None = None
    error: GrammarError | None = None


def accept(seq: Sequence, tokens: SequenceOf[int]) -> Accepted:
    """Apply the sequence's stop ids and length, then its constraint."""
    accepted = _within_limits(seq, tokens)
    if seq.constraint is None:
        return accepted
    try:
        count = seq.constraint.advance(tokens[: accepted.num_tokens])
    except GrammarError as error:
        return Accepted(0, FinishReason.ERROR, None, error)
    # An output is complete even where no token is left for EOS.
    if seq.constraint.is_complete and (seq.constraint.ends_itself or accepted.reason is FinishReason.LENGTH):
        return Accepted(count, FinishReason.STOP)
    return accepted


def _within_limits(seq: Sequence, tokens: SequenceOf[int]) -> Accepted:
    stop_ids, room = seq.stop_ids, seq.max_len - len(seq.tokens)
    for count, token in enumerate(tokens, 1):
        # The sampler suppresses stop ids before min_tokens already; a scripted model or a draft may not.
        if token in stop_ids and seq.num_generated + count > seq.params.min_tokens:
            return Accepted(count, FinishReason.STOP, token)
        if count >= room:
            return Accepted(count, FinishReason.LENGTH)
    return Accepted(len(tokens))

"""What a grammar says of the tokens that a sequence is about to accept: do they count, and is the output complete?

Advances the constraint, which `Scheduler.commit` alone may do; writes nothing else. Called by it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from penstock.constraint import Constraint
from penstock.errors import GrammarError
from penstock.sequence import FinishReason

# How many tokens count, why the sequence ends with the last of them, its stop token, and the error that ends it.
Accepted = tuple[int, FinishReason | None, int | None, GrammarError | None]


def constrain(
    constraint: Constraint, tokens: SequenceOf[int], reason: FinishReason | None, stop_token: int | None
) -> Accepted:
    """Advance over tokens that would be accepted, the last for this reason; a complete output may end the sequence."""
    try:
        count = constraint.advance(tokens)
    except GrammarError as error:
        return 0, FinishReason.ERROR, None, error
    # An output is complete even where no token is left for EOS.
    if constraint.is_complete and (constraint.ends_itself or reason is FinishReason.LENGTH):
        return count, FinishReason.STOP, None, None
    return count, reason, stop_token, None

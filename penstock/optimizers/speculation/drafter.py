"""`Drafter`: proposes the next tokens of sequences, with the messages it takes and gives.

Frozen messages and one protocol. A drafter reads sequences and never writes them; a wrong draft token costs time and
never changes the output. Implemented by `ngram`, `suffix` and `draft_model`; called by the engine's loop before it
plans a step.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from penstock.sequence import Sequence

# Levels of confidence that a drafter may assign to its tokens, lowest first. The acceptance rate of each is measured.
NUM_CONFIDENCE_LEVELS = 8


class DraftRequest(NamedTuple):
    """Asks for at most `max_tokens` tokens to follow `seq.tokens`.

    `acceptance_rates` [NUM_CONFIDENCE_LEVELS] is how often tokens of each level are accepted. A draft should end where
    the probability that all of it is accepted falls below `min_acceptance`.
    """

    seq: Sequence
    max_tokens: int
    acceptance_rates: SequenceOf[float]
    min_acceptance: float = 0.0


class Draft(NamedTuple):
    """Draft tokens and the confidence level of each; both empty where the drafter has nothing to propose."""

    tokens: tuple[int, ...] = ()
    confidences: tuple[int, ...] = ()


class Drafter(Protocol):
    """Proposes tokens. `runs_model` says that `propose` is slow and has to run on the model's thread."""

    name: str
    runs_model: bool

    def propose(self, requests: SequenceOf[DraftRequest]) -> list[Draft]:
        """A draft for each request, in order."""
        ...

    def forget(self, seq_id: int) -> None:
        """Drop the state of a sequence that ended; possibly from another thread than `propose`."""
        ...

"""`Drafter`: whoever guesses the next tokens of sequences; what it is asked, and what it answers.

Frozen messages and one protocol. A drafter reads sequences and never writes them; a wrong guess costs time, never a
token. Implemented by `ngram`, `suffix` and `draft_model`; consulted by the engine's loop before it plans a step.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from penstock.sequence import Sequence

# Kinds of guesses that a drafter may tell apart, from hopeless to nearly sure. How often each is right is learnt.
NUM_KINDS = 8


class Ask(NamedTuple):
    """At most `most` tokens to come after `seq.tokens`, please. `chances` [NUM_KINDS]: how often each kind is right.

    A guess whose chance, together with those before it, falls below `least` is not worth its making.
    """

    seq: Sequence
    most: int
    chances: SequenceOf[float]
    least: float = 0.0


class Draft(NamedTuple):
    """Guessed tokens, and of which kind each guess is; both empty when there is nothing to say."""

    tokens: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()


class Drafter(Protocol):
    """Guesses tokens. `runs_model` says that `propose` has to run on the model's thread, and takes its time."""

    name: str
    runs_model: bool

    def propose(self, asks: SequenceOf[Ask]) -> list[Draft]:
        """A draft for each ask, in order."""
        ...

    def forget(self, seq_id: int) -> None:
        """Drop what is remembered of a sequence that ended; from another thread than `propose`, perhaps."""
        ...

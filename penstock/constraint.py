"""`Constraint`: what a grammar offers to the scheduler and the sampler, whatever library is behind it.

Protocols and the messages between them. A constraint belongs to one sequence and follows its output tokens; it knows
neither blocks nor steps. Implemented in `constraints`; advanced by `Scheduler.commit` alone, on the engine's thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from penstock.errors import GrammarError


class MaskRequest(NamedTuple):
    """Asks for the masks of one sequence: number `first` for its next token, and one more after each draft token."""

    constraint: Constraint
    first: int
    draft: tuple[int, ...] = ()


class MaskFiller(Protocol):
    """Computes masks for all sequences of a step."""

    @property
    def num_words(self) -> int:
        """Number of 32-bit words of a mask, which has a bit for each token."""
        ...

    def fill(self, requests: SequenceOf[MaskRequest], bits: array[int]) -> Mapping[int, GrammarError]:
        """Write the masks into `bits`, one after the other; a token's bit is set if the token may follow.

        Returns errors by place in `requests`. The masks of such a request are void.
        """
        ...


class Constraint(Protocol):
    """What a sequence's output must be, and how much of it the accepted tokens make."""

    @property
    def ends_itself(self) -> bool:
        """Whether no EOS ends the sequence, so that the token that completes the output has to."""
        ...

    @property
    def filler(self) -> MaskFiller:
        """Computes the masks of this and all other constraints of the engine."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete and nothing may follow but EOS."""
        ...

    @property
    def prefers_candidates(self) -> bool:
        """Whether `first_allowed` may be asked for the next token, and is likely to take less time than a mask."""
        ...

    def first_allowed(self, candidates: SequenceOf[int]) -> int | None:
        """The first of these tokens that the mask would allow as the next one; None if a mask has to tell.

        Asked on the model's thread, during a step for which the constraint preferred it. It does not advance.
        """
        ...

    def advance(self, tokens: SequenceOf[int]) -> int:
        """Take in accepted tokens. Returns how many of them count: with `ends_itself`, none after a complete output.

        Raises `GrammarError` for a token that may not follow. The constraint is of no use from then on.
        """
        ...

    def trim(self, draft: SequenceOf[int]) -> tuple[int, ...]:
        """The draft up to the first token that may not follow; never EOS. The constraint does not advance."""
        ...

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        """The next tokens where only one text may follow, as the tokenizer would encode it; may be empty."""
        ...

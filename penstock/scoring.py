"""`ScoringParams`: the parameters of a request that scores the end of its prompt and generates nothing.

Owns which parameters of another request change the distribution that it samples from. Built by
`engine/requests/scoring.py`; read by every layer below as the parameters of any other sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from penstock.errors import RequestError
from penstock.sampling import SamplingParams

# They say how many tokens to generate and what to report of them, not what each one is drawn from.
_WITHOUT_EFFECT = frozenset(
    {
        *("n", "best_of", "rank_by", "length_penalty", "early_stopping", "use_beam_search", "speculation_length"),
        *("logprobs", "prompt_logprobs", "detokenize", "output_kind", "reasoning_end", "structured_outputs"),
    }
)
# The parameters that a token is drawn from.
DRAWN_FROM = tuple(f.name for f in fields(SamplingParams) if f.init and f.name not in _WITHOUT_EFFECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringParams(SamplingParams):
    """What to score of the last `num_scored` tokens of a prompt, the completion.

    Their raw log probabilities always; with `tempers`, those under the other parameters too; `wants_logits` and
    `wants_entropies` add these. `detokenize` is False, whatever is passed.
    """

    generates: ClassVar[bool] = False
    num_scored: int
    tempers: bool = False
    wants_logits: bool = False
    wants_entropies: bool = False

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)  # `super()` does not work in a class with slots
        object.__setattr__(self, "detokenize", False)

    @classmethod
    def of(cls, params: SamplingParams | None, num_scored: int, *, logits: bool, entropies: bool) -> Self:
        """Score under these parameters too, unless they are None.

        Raises `RequestError` for a grammar or a beam search, whose distributions cannot be computed from a text alone.
        """
        if params is not None and (params.structured_outputs is not None or params.use_beam_search):
            name = "use_beam_search" if params.use_beam_search else "structured_outputs"
            raise RequestError(
                f"a score does not apply {name}: leave it out of params, or leave params out", parameter=name
            )
        values: dict[str, Any] = {} if params is None else {name: getattr(params, name) for name in DRAWN_FROM}
        values |= {"tempers": params is not None, "wants_logits": logits, "wants_entropies": entropies}
        return cls(num_scored=num_scored, **values)

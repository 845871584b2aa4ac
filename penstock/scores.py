"""`Score`: what `Scorer.score` returns for one prompt and completion; `ScorePart`: what one step contributes to it.

`DifferentiableScore` is a score whose log probabilities carry gradients.

Owns how parts become a whole. Built by the model's thread, joined on the caller's; never refers to an engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

# A float32 numpy array. Importing numpy with the package would take longer than the package itself.
FloatArray = Any
# A tensor of torch, which is imported with the first model.
Tensor = Any


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """The log probabilities of a completion of R tokens, in nats, as float32 numpy arrays without the prompt.

    `logprobs` [R] are the model's own: no temperature, no filter; always finite. `tempered` [R], given the parameters
    of a request, are those under the distribution that such a request samples from: rules, temperature, filters. They
    are -inf for a token that it could not have sampled. On request, `logits` [R, vocab] are the model's own logits in
    front of each token, and `entropies` [R] the entropies of its own distribution there. All are of one
    `weight_version`.
    """

    logprobs: FloatArray
    tempered: FloatArray | None = None
    logits: FloatArray | None = None
    entropies: FloatArray | None = None
    weight_version: int = field(default=0, kw_only=True)

    def __len__(self) -> int:
        return len(self.logprobs)


@dataclass(frozen=True, slots=True, eq=False)
class DifferentiableScore:
    """The log probabilities of a completion of R tokens, in nats, as torch tensors that carry gradients.

    `logprobs` and `entropies`, float32 [R], are those of the model's distribution at the temperature asked for. Where
    the values are the engine's, `drift` [R] tells how much higher the module's own are; it carries no gradients.
    `weight_version` is that of the weights.
    """

    logprobs: Tensor
    entropies: Tensor
    drift: Tensor | None = None
    weight_version: int = field(default=0, kw_only=True)


@dataclass(frozen=True, slots=True, eq=False)
class ScorePart:
    """The scores of some consecutive tokens of a completion, of which the first one is number `begin`.

    A sequence that computes its scores again, after a preemption or an update of the weights, begins at 0 again:
    earlier parts are then void, so that all parts of a whole have one `weight_version`.
    """

    begin: int
    score: Score
    weight_version: int = 0


def joined(parts: list[ScorePart]) -> Score:
    """The whole of which these are the parts, in order. Empties the list, so that each part is freed once copied."""
    version = parts[-1].weight_version
    if len(parts) == 1:
        return replace(parts.pop().score, weight_version=version)
    num_tokens = parts[-1].begin + len(parts[-1].score)
    first = parts[0].score
    whole = Score(*(_like(array, num_tokens) for array in _arrays(first)), weight_version=version)
    del first
    while parts:
        part = parts.pop()
        end = part.begin + len(part.score)
        for array, values in zip(_arrays(whole), _arrays(part.score), strict=True):
            if array is not None:
                array[part.begin : end] = values
    return whole


def _arrays(score: Score) -> tuple[FloatArray, ...]:
    return score.logprobs, score.tempered, score.logits, score.entropies


def _like(array: FloatArray, length: int) -> FloatArray:
    import numpy as np

    return None if array is None else np.empty((length, *array.shape[1:]), dtype=np.float32)

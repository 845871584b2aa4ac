"""`LogprobReport`: how far an engine's log probabilities are from those of the module that is trained; `report_on`.

Owns the arithmetic. Never runs a model. Made by `InferenceEngine.check_logprobs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FloatArray = Any  # a float array of numpy, which is not imported with the package


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """One token: number `position` of completion `index` of a request, and its two log probabilities in nats."""

    request_id: str
    index: int
    position: int
    token_id: int
    engine_logprob: float
    module_logprob: float


@dataclass(frozen=True, slots=True)
class LogprobReport:
    """How far an engine's log probabilities of its own outputs are from those of the live module, token by token.

    Both are the model's own (no temperature, no filter), under the weights of `weight_version`. `max_difference` and
    `mean_difference` are absolute, in nats. A ratio is the module's probability of a token over the engine's, the
    importance ratio of an on-policy step, ideally 1; `kl` is the mean of ratio - 1 - log(ratio), which estimates the
    divergence of the engine's distribution from the module's in nats per token (Schulman 2020, "Approximating KL
    divergence"). `worst` is the token with the largest difference.

    `num_tokens` tokens of `num_completions` completions were compared. Left out were `num_other_version` tokens that
    were sampled with weights of another version, and `num_stale` ones of completions that went on with K/V of older
    weights.
    """

    weight_version: int
    num_completions: int
    num_tokens: int
    num_other_version: int
    num_stale: int
    max_difference: float
    mean_difference: float
    min_ratio: float
    mean_ratio: float
    max_ratio: float
    kl: float
    worst: TokenDifference


@dataclass(frozen=True, slots=True)
class Compared:
    """A completion with its two log probabilities of each token; `module_logprobs`, float [tokens], on the host."""

    request_id: str
    index: int
    token_ids: Sequence[int]
    weight_versions: Sequence[int]
    engine_logprobs: Sequence[float]
    module_logprobs: FloatArray


def report_on(
    completions: Sequence[Compared], weight_version: int, num_other_version: int, num_stale: int
) -> LogprobReport:
    """The report on all tokens of these completions that have this version; there is at least one."""
    import numpy as np

    places = [
        (completion, position)
        for completion in completions
        for position, version in enumerate(completion.weight_versions)
        if version == weight_version
    ]
    engine = np.array([completion.engine_logprobs[position] for completion, position in places])
    module = np.array([completion.module_logprobs[position] for completion, position in places], dtype=np.float64)
    differences = np.abs(module - engine)
    ratios = np.exp(module - engine)
    completion, position = places[int(differences.argmax())]  # a NaN, if there is one
    worst = TokenDifference(
        *(completion.request_id, completion.index, position, completion.token_ids[position]),
        *(float(completion.engine_logprobs[position]), float(completion.module_logprobs[position])),
    )
    return LogprobReport(
        *(weight_version, len(completions), len(places), num_other_version, num_stale),
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        min_ratio=float(ratios.min()),
        mean_ratio=float(ratios.mean()),
        max_ratio=float(ratios.max()),
        kl=float((ratios - 1 - (module - engine)).mean()),
        worst=worst,
    )

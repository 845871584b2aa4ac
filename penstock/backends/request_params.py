"""What every translation of a request's parameters into another engine's needs. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields

from penstock.config import EngineConfig
from penstock.errors import RequestError
from penstock.generation import GenerationConfig
from penstock.sampling import SamplingParams

# New tokens of a request without parameters, unless the model's generation config limits them: as in the native engine.
NEW_TOKENS: int = EngineConfig.model_fields["default_max_tokens"].default
# Without effect on what is generated: the form of a stream, a limit on drafts, and what concerns beams and ranks only.
IGNORED = ("output_kind", "speculation_length", "early_stopping", "length_penalty", "renormalize_logits")
_DEFAULTS = SamplingParams()


def plain_params(params: SamplingParams | GenerationConfig) -> SamplingParams:
    """The parameters under this package's names."""
    return params.sampling_params() if isinstance(params, GenerationConfig) else params


def changed(params: SamplingParams) -> list[str]:
    """The names of the parameters that are not their defaults."""
    return [field.name for field in fields(params) if field.init and not _is_default(params, field.name)]


def refuse_unknown(engine: str, params: SamplingParams, names: Collection[str]) -> None:
    """Raise `RequestError` for a parameter that an engine of this name does not have, unless it is its default."""
    for name in changed(params):
        if name not in names:
            text = f"{engine} has no {name} in a request: leave it out, or use the native engine"
            raise RequestError(text, parameter=name)


def refuse_whitespace_pattern(engine: str, params: SamplingParams) -> None:
    """Raise `RequestError` for a pattern that would hold for this request alone."""
    if params.structured_outputs is not None and params.structured_outputs.whitespace_pattern is not None:
        raise RequestError(
            f"{engine} has one whitespace_pattern for all requests: leave it out", parameter="structured_outputs"
        )


def as_sampled(params: SamplingParams, logprobs: Iterable[float]) -> Iterable[float]:
    """The log probabilities as sampled, where the model's own tell them; otherwise none."""
    if params.greedy:
        return [0.0 for _ in logprobs]
    is_model = params.temperature == 1 and params.top_p == 1 and not params.top_k and not params.min_p
    return logprobs if is_model and not params.is_ruled and params.structured_outputs is None else ()


def _is_default(params: SamplingParams, name: str) -> bool:
    value = getattr(params, name)
    return bool(value == getattr(_DEFAULTS, name)) or (name == "best_of" and value == params.n)

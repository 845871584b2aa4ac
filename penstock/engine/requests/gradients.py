"""`GradientOptions` and `score_with_gradients`: scores as tensors, through the live module that an engine borrows.

Computed on a thread of their own: never the model's, where PyTorch may be confined to one thread, and never the
caller's, whose event loop goes on. Called by `InferenceEngine.score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

from penstock.api.arguments import check_params
from penstock.api.prompt import PromptInput
from penstock.api.protocols import WithAdapters
from penstock.engine.requests.batch import BatchOptions
from penstock.engine.requests.scoring import Encode, Wishes, encoded, score
from penstock.errors import ConfigurationError, RequestError
from penstock.generation import GenerationConfig, Params
from penstock.models.protocol import DifferentiableRunner
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scores import DifferentiableScore, FloatArray
from penstock.scoring import DRAWN_FROM
from penstock.values import flag

# They say when a completion ends, and how its text looks.
_WITHOUT_EFFECT = frozenset(
    {
        *("temperature", "seed", "max_tokens", "min_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos"),
        *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "renormalize_logits"),
    }
)
_DEFAULTS = SamplingParams()


@dataclass(frozen=True, slots=True)
class GradientOptions:
    """How to score with gradients. Of `params` only the temperature counts. Raises `RequestError`.

    `values` are "module", what the module computes itself, or "engine", what the engine scores: the gradients are the
    module's in both cases. `checkpoint_layers` recomputes layers in the backward pass instead of keeping activations.
    """

    params: Params
    values: Literal["module", "engine"]
    checkpoint_layers: bool

    def __post_init__(self) -> None:
        params = check_params(self.params)
        if isinstance(params, GenerationConfig):
            params = params.sampling_params()
        object.__setattr__(self, "params", params)
        if self.values not in ("module", "engine"):
            raise RequestError(f"values must be 'module' or 'engine', not {self.values!r}")
        flag("checkpoint_layers", self.checkpoint_layers)
        if params is None:
            return
        if changed := [name for name in _RESTRICTING if getattr(params, name) != getattr(_DEFAULTS, name)]:
            raise RequestError(f"a score with gradients does not apply {', '.join(changed)}: leave it out of params")
        if params.temperature == 0:
            raise RequestError("a score with gradients needs a temperature above 0: greedy choices have no gradient")

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        return self.params.temperature if isinstance(self.params, SamplingParams) else 1.0


def refuse_without_effect(wishes: Wishes, options: BatchOptions) -> None:
    """Raise `RequestError` for what a score with gradients could only ignore; entropies it always has."""
    given = {
        "logits": wishes.logits,
        "namespace": options.namespace != "",
        "priority": options.priority != RequestPriority.NORMAL,
        "deadline": options.deadline is not None,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        raise RequestError(f"{' and '.join(names)} cannot be combined with requires_grad: leave {names[0]} out")


class ReadableEngine(WithAdapters, Protocol):
    """An engine that tells whether its weights were updated while they were read."""

    def reading_weights(self) -> AbstractContextManager[int]:
        """A block that needs the weights of one version. Raises `EngineStateError`."""
        ...


_RESTRICTING = tuple(name for name in DRAWN_FROM if name not in _WITHOUT_EFFECT)


async def score_with_gradients(
    engine: ReadableEngine,
    runner: object,
    pairs: Sequence[tuple[PromptInput, PromptInput]],
    options: GradientOptions,
    encode: Encode,
) -> list[DifferentiableScore]:
    """A score for every pair of prompt and completion.

    Raises `RequestError`, `ConfigurationError`, and `EngineStateError` where the weights were updated meanwhile.
    """
    if not pairs:
        return []
    if not isinstance(runner, DifferentiableRunner):
        raise ConfigurationError("this model computes no gradients: pass a live transformers module to InferenceEngine")
    scorer = runner.gradient_scorer(checkpoint_layers=options.checkpoint_layers)
    prompts, completions = zip(*[await encoded(pair, encode) for pair in pairs], strict=True)
    values: list[FloatArray] | None = None
    from anyio import to_thread  # imported here, because most programs never score with gradients

    with engine.reading_weights() as version:
        if options.values == "engine":
            wishes = Wishes(options.params, logits=False, entropies=False)
            engine_scores = await score(engine, pairs, wishes, BatchOptions("", RequestPriority.NORMAL, None), encode)
            values = [each.logprobs if each.tempered is None else each.tempered for each in engine_scores]
        compute = partial(scorer.score, prompts, completions, temperature=options.temperature, values=values)
        scores = await to_thread.run_sync(compute)
    return [replace(differentiable, weight_version=version) for differentiable in scores]

"""`generate_with`: TRL's own GRPOTrainer and RLOOTrainer, unmodified, with an engine of this process as generator.

The engine borrows the trainer's model, so no weights are sent: after each optimizer step it takes over what changed.
Stands in for the vLLM client of the trainers (TRL 1.16). Imports nothing of TRL.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from penstock.api.blocking import run
from penstock.config import EngineConfig, canonical
from penstock.engine.inference import InferenceEngine
from penstock.errors import ConfigurationError, RequestError
from penstock.outputs import CompletionOutput
from penstock.sampling import SamplingParams

Trainer = Any  # a GRPOTrainer or RLOOTrainer, whose package is not installed with this one
Rows = list[list[list[float]]]
_DEFAULTS = {"max_queue_size": 1_000_000, "max_sequence_length": None}  # a trainer's batch and lengths are its own
_RESTRICTING = ("top_p", "top_k", "min_p", "repetition_penalty")
_UNRESTRICTED = SamplingParams()
_ATTRIBUTES = frozenset({"use_vllm", "vllm_mode", "vllm_generation", "_last_loaded_step"})  # that the block has set


@contextmanager
def generate_with(trainer: Trainer, **settings: Any) -> Iterator[InferenceEngine]:
    """Inside the block, the trainer samples its completions from an engine that borrows its model.

    `settings` are those of `EngineConfig`; by default the queue holds any batch, and sequences may be as long as the
    model allows. Sampling follows the trainer's arguments, its seed included, and GRPO's
    importance ratios are those of the engine's log probabilities to the trainer's own, both at the temperature and
    without filters. Raises `ConfigurationError` for a trainer that has a generator already, or none.
    """
    if not hasattr(trainer, "use_vllm") or trainer.use_vllm or getattr(trainer, "rollout_func", None) is not None:
        raise ConfigurationError(
            "generate_with takes a GRPOTrainer or RLOOTrainer with use_vllm=False and without a rollout_func"
        )
    before = {name: value for name, value in vars(trainer).items() if name in _ATTRIBUTES}
    config = EngineConfig(**{**_DEFAULTS, **canonical(settings)})
    engine = InferenceEngine(trainer.model, trainer.processing_class, config)
    try:
        engine.start()
        trainer.vllm_generation = EngineGeneration(engine, params_of(trainer), trainer.args.seed)
        trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "server", -1
        yield engine
    finally:
        for name in _ATTRIBUTES & vars(trainer).keys():
            delattr(trainer, name)
        for name, value in before.items():
            setattr(trainer, name, value)
        engine.stop(0.0)


def params_of(trainer: Trainer) -> SamplingParams:
    """What the trainer samples from."""
    return SamplingParams(
        temperature=trainer.temperature,
        top_p=trainer.top_p,
        top_k=trainer.top_k or 0,
        min_p=trainer.min_p or 0.0,
        repetition_penalty=trainer.repetition_penalty,
        max_tokens=trainer.max_completion_length,
        detokenize=False,
        logprobs=0,
    )


class EngineGeneration:
    """What a trainer asks of its vLLM client."""

    def __init__(self, engine: InferenceEngine, params: SamplingParams, seed: int) -> None:
        self._engine = engine
        self._params = params
        self._seeds = random.Random(seed)

    def sync_weights(self) -> None:
        """Take over what the optimizer changed."""
        run(self._engine.update_weights())

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: object,
        num_generations: int,
        profiler: AbstractContextManager[object] | None = None,
    ) -> tuple[list[list[int]], list[list[int]], Rows, list[list[list[int]]]]:
        """Prompt ids, completion ids, and the log probability and id of each token, one row per prompt.

        The trainers repeat a prompt `num_generations` times themselves. Raises `RequestError` for images.
        """
        if images is not None:
            raise RequestError("this engine generates from text alone: train without images")
        handles, room = [], self._engine.get_stats()["max_sequence_length"]
        with profiler or nullcontext():
            try:
                for prompt in prompts:
                    params = self._params_for(len(prompt), room)
                    handles.append(self._engine.generate(list(prompt), params))
                outputs = [handle.result().outputs[0] for handle in handles]
            finally:
                for handle in handles:
                    handle.cancel()
        ids = [output.token_ids for output in outputs]
        logprobs = [[[value] for value in row] for row in self._logprobs(prompts, outputs)]
        return [list(prompt) for prompt in prompts], ids, logprobs, [[[token] for token in row] for row in ids]

    def _params_for(self, prompt_tokens: int, max_length: int | None) -> SamplingParams:
        """With a seed of its own; completions end where the model's length does, as those of vLLM and transformers."""
        max_tokens = self._params.max_tokens
        if max_tokens is not None and max_length is not None:
            max_tokens = max(1, min(max_tokens, max_length - prompt_tokens))
        return replace(self._params, seed=self._seeds.getrandbits(63), max_tokens=max_tokens)

    def _logprobs(self, prompts: Sequence[Sequence[int]], outputs: Sequence[CompletionOutput]) -> list[list[float]]:
        """What the trainers compute too: at the temperature, without the filters and the penalty.

        Those would make each ratio the probability that they keep, and the ratio of a long completion almost 0.
        """
        temperature = self._params.temperature
        if temperature == 1:
            return [output.token_logprobs for output in outputs]
        if all(getattr(self._params, name) == getattr(_UNRESTRICTED, name) for name in _RESTRICTING):
            return [output.sampled_logprobs for output in outputs]
        completions = [output.token_ids for output in outputs]
        tempered = SamplingParams(temperature=temperature)
        scores = run(self._engine.score([list(prompt) for prompt in prompts], completions, params=tempered))
        return [[] if score.tempered is None else score.tempered.tolist() for score in scores]

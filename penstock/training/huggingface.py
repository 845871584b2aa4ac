"""`HuggingFaceBackend`: a transformers model, served by the native engine and trained by the program.

There is one copy of the weights: the engine borrows the module, so changes in place take effect at the next step.
Called by `InferenceModule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.api.prompt import as_batch
from penstock.api.protocols import Completion
from penstock.config import EngineConfig, canonical
from penstock.demo import MODEL_DIR
from penstock.engine.inference import InferenceEngine
from penstock.engine.replicas.engine import ReplicatedEngine
from penstock.errors import ConfigurationError, shown
from penstock.models.folder import check_source, check_tokenizer_files
from penstock.training.backend import EngineBackend, Prompts, Responses, Tensor, as_responses
from penstock.values import token_ids

Module = Any  # a torch.nn.Module; importing torch with the package would take seconds
# The queue holds any batch.
_DEFAULTS = {"max_queue_size": 1_000_000}


class HuggingFaceBackend(EngineBackend):
    """Loads a model from a hub id or a folder; a live module is borrowed, and None is the model of the package.

    `device` is "auto", "cpu", "cuda" or "cuda:1". `dtype` is "auto" (the checkpoint's), "float32", "float16" or
    "bfloat16", their short forms "fp32", "fp16" and "bf16", or a `torch.dtype`. `tokenizer` is an object or a name, by
    default the model's own; a live module needs one. `model_kwargs` are settings of `EngineConfig`. `model` is the
    module itself, for a trainer, which changes it in place inside `updating()`. With more than one of `replicas`, a
    `ReplicatedEngine` runs it and copies of it, each on a GPU or all on the CPU. Raises `ConfigurationError`,
    `OutOfMemory`.
    """

    engine: InferenceEngine | ReplicatedEngine

    def __init__(
        self,
        model_name: object = None,
        device: str = "auto",
        dtype: object = "auto",
        trust_remote_code: bool = False,
        *,
        tokenizer: object = None,
        replicas: int = 1,
        **model_kwargs: Any,
    ) -> None:
        settings = {**_DEFAULTS, **canonical(model_kwargs), "trust_remote_code": trust_remote_code}
        placement: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
        config = EngineConfig(**settings, **placement)
        self.model: Module = _module(model_name, config)
        if tokenizer is None and config.tokenizer is None and self.model is not model_name:
            tokenizer = _source(model_name)
            check_tokenizer_files(tokenizer)
        parts = self.model, tokenizer, EngineConfig(**settings)
        super().__init__(InferenceEngine(*parts) if replicas == 1 else ReplicatedEngine(*parts, replicas=replicas))
        self.engine.start()

    @property
    def device(self) -> str:
        from penstock.training.tensors import device_of

        return device_of(self.model)

    async def ascore_with_gradients(self, prompts: Prompts, responses: Responses, *, logits: bool) -> list[Tensor]:
        """Through the module, in the mode (train or eval) that it is in, beside the engine's steps.

        Raises `RequestError`, and `EngineStateError` where the weights are updated meanwhile.
        """
        from penstock.models.gradients.scorer import DifferentiableScorer

        prompt_ids = [await self.engine.tokenize(prompt) for prompt in as_batch(prompts)]
        response_ids = [await self._ids(response) for response in as_responses(responses)]
        scorer = DifferentiableScorer(self.model)
        with self.engine.reading_weights():
            if logits:
                return scorer.logits(prompt_ids, response_ids)
            return [score.logprobs for score in scorer.score(prompt_ids, response_ids)]

    async def _ids(self, response: Completion) -> Sequence[int]:
        if isinstance(response, str):
            return await self.engine.tokenize(response, add_special_tokens=False) if response else []
        return token_ids("response", response)


def _module(model: object, config: EngineConfig) -> Module:
    """The module to serve, on the device and in the dtype of `config`. Raises `ConfigurationError`."""
    if hasattr(model, "parameters"):
        if (config.device, config.dtype) != ("auto", "auto"):
            raise ConfigurationError("a live module stays on its device and in its dtype: call module.to(...) instead")
        return model
    source = check_source(_source(model))
    from penstock.models.loading import load_bare

    return load_bare(source, config)


def _source(model: object) -> str:
    if model is None:
        return str(MODEL_DIR)
    if not isinstance(model, str | Path):
        raise ConfigurationError(f"a model cannot be {shown(model)}: pass a hub id, a folder, an nn.Module or None")
    return str(model)

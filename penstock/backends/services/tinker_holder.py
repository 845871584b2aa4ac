"""`TinkerServiceHolder`: Tinker, or a compatible service, through the `tinker` package (0.38 or newer)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

from penstock.api.prompt import Prompt
from penstock.backends.services.hf_tokenizer import Tokenizer
from penstock.backends.services.holder import Sample, Sampling
from penstock.backends.services.records import TrainRecord
from penstock.backends.services.sdk_holder import Client, SdkServiceHolder, sdk_errors
from penstock.errors import ConfigurationError


class TinkerServiceHolder(SdkServiceHolder):
    """Samples, and trains a LoRA adapter. The key is `TINKER_API_KEY`; `base_url` defaults to `TINKER_BASE_URL`.

    Prompts are rendered by the chat template of the tokenizer, so `renderer_name` must stay None. Raises
    `ConfigurationError` for it.
    """

    def __init__(
        self,
        base_model: str = "",
        lora_rank: int = 32,
        base_url: str | None = None,
        renderer_name: str | None = None,
        tokenizer_path: str | None = None,
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        super().__init__(base_model, tokenizer_path)
        if renderer_name is not None:
            raise ConfigurationError("renderer_name is not known here: leave it out, and set tool_parser")
        self.lora_rank = lora_rank
        self.base_url = base_url
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser

    def _sample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        ids = self._ids_of(prompt)
        with sdk_errors("Tinker"):
            return _samples(ids, self._submit(ids, sampling).result())

    async def _asample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        with sdk_errors("Tinker"):
            ids = await asyncio.to_thread(self._ids_of, prompt)
            future = await asyncio.to_thread(self._submit, ids, sampling)
            return _samples(ids, await future)

    def compute_logprobs(self, tokens: Sequence[int]) -> list[float | None]:
        """The log probability of each token after those before it; None for the first."""
        from tinker import types

        with sdk_errors("Tinker"):
            prompt = types.ModelInput.from_ints(list(tokens))
            return list(self.get_sampling_client().compute_logprobs(prompt).result())

    def forward_backward(
        self,
        datums_data: Sequence[object],
        loss_fn: str = "importance_sampling",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> Any:
        """Accumulate gradients. A datum is a `tinker.Datum`, or a mapping of `model_input` ids and `loss_fn_inputs`."""
        with sdk_errors("Tinker"):
            data = [_datum(datum) for datum in datums_data]
            return self.get_training_client().forward_backward(data, loss_fn, loss_fn_config).result()

    def optim_step(self, learning_rate: float = 2e-6, **adam: float) -> Any:
        """One step of Adam. `adam` are further fields of `tinker.AdamParams`."""
        from tinker import types

        defaults = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 1e-2, "eps": 1e-8, "grad_clip_norm": 1.0}
        with sdk_errors("Tinker"):
            params = types.AdamParams(learning_rate=learning_rate, **{**defaults, **adam})
            return self.get_training_client().optim_step(params).result()

    def save_weights_for_sampler(self, name: str) -> str:
        """Save the trained weights; their path."""
        with sdk_errors("Tinker"):
            return str(self.get_training_client().save_weights_for_sampler(name).result().path)

    def _new_service(self) -> Client:
        try:
            import tinker
        except ImportError:
            raise ImportError("TinkerServiceHolder needs the package tinker: pip install 'penstock[tinker]'") from None
        return tinker.ServiceClient(base_url=self.base_url)

    def _end(self, service: Client) -> None:
        with sdk_errors("Tinker"):
            service.close("success").result()

    def _new_training(self, service: Client) -> Client:
        with sdk_errors("Tinker"):
            return service.create_lora_training_client(self.base_model, rank=self.lora_rank).result()

    def _new_sampling(self, service: Client, path: str | None) -> Client:
        source = {"base_model": self.base_model} if path is None else {"model_path": path}
        with sdk_errors("Tinker"):
            return service.create_sampling_client(**source).result()

    def _service_tokenizer(self) -> Tokenizer:
        with sdk_errors("Tinker"):
            return cast(Tokenizer, self.get_sampling_client().get_tokenizer())

    def _submit(self, ids: Sequence[int], sampling: Sampling) -> Any:
        """Begin to draw samples; a future that can be awaited."""
        from tinker import types

        params = types.SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            stop=list(sampling.stop) or None,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
        )
        prompt = types.ModelInput.from_ints(list(ids))
        return self.get_sampling_client().sample(prompt, sampling.num_samples, params)


def _samples(ids: Sequence[int], response: Any) -> list[Sample]:
    return [
        Sample(TrainRecord(ids, list(sequence.tokens), sequence.logprobs or ()), sequence.stop_reason)
        for sequence in response.sequences
    ]


def _datum(datum: object) -> object:
    from tinker import types

    if not isinstance(datum, Mapping):
        return datum
    return types.Datum(types.ModelInput.from_ints(list(datum["model_input"])), dict(datum["loss_fn_inputs"]))

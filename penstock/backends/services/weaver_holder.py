"""`WeaverServiceHolder`: Weaver, through the package `nex-weaver` (1.19 or newer), which no extra installs."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.api.prompt import Prompt
from penstock.backends.services.hf_tokenizer import Tokenizer, shared_tokenizer
from penstock.backends.services.holder import Sample, Sampling
from penstock.backends.services.records import TrainRecord
from penstock.backends.services.sdk_holder import Client, SdkServiceHolder, sdk_errors


class WeaverServiceHolder(SdkServiceHolder):
    """Samples, and trains in `training_mode` ("lora" or "full_ft"). The key is `WEAVER_API_KEY`.

    `base_url` defaults to `WEAVER_BASE_URL`.
    """

    def __init__(
        self,
        base_model: str = "",
        lora_rank: int = 32,
        base_url: str | None = None,
        tokenizer_path: str | None = None,
        training_mode: str = "lora",
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        super().__init__(base_model, tokenizer_path)
        self.lora_rank = lora_rank
        self.base_url = base_url
        self.training_mode = training_mode
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser

    def _sample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        ids = self._ids_of(prompt)
        with sdk_errors("Weaver"):
            types, params = _weaver().types, _params(sampling)
            client, prompt = self.get_sampling_client(), types.ModelInput.from_ints(ids)
            result = client.sample(prompt=prompt, sampling_params=params, num_samples=sampling.num_samples)
        versions = () if result.get("weight_version") is None else (result["weight_version"],)
        return [_sample_of(ids, sequence, versions) for sequence in result.get("sequences", ())]

    async def _asample(self, prompt: Prompt, sampling: Sampling) -> list[Sample]:
        return await asyncio.to_thread(self._sample, prompt, sampling)

    def compute_logprobs(self, tokens: Sequence[int]) -> list[float | None]:
        """The log probability of each token after those before it; None for the first."""
        with sdk_errors("Weaver"):
            prompt = _weaver().types.ModelInput.from_ints(list(tokens))
            return list(self.get_sampling_client().compute_logprobs(prompt=prompt))

    def forward_backward(
        self,
        datums_data: Sequence[object],
        loss_fn: str = "importance_sampling",
        loss_fn_config: Mapping[str, object] | None = None,
    ) -> Any:
        """Accumulate gradients over `weaver.types.Datum` objects."""
        with sdk_errors("Weaver"):
            return self.get_training_client().forward_backward(
                list(datums_data), loss_fn, loss_fn_config=loss_fn_config
            )

    def optim_step(self, learning_rate: float = 2e-6, **adam: float) -> Any:
        """One step of Adam. `adam` are further fields of `weaver.types.AdamParams`."""
        with sdk_errors("Weaver"):
            params = _weaver().types.AdamParams(learning_rate=learning_rate, **adam)
            return self.get_training_client().optim_step(params)

    def save_weights_for_sampler(self, name: str) -> str:
        """Save the trained weights; their path."""
        with sdk_errors("Weaver"):
            return str(self.get_training_client().save_weights_for_sampler(name=name))

    def _new_service(self) -> Client:
        weaver = _weaver()
        with sdk_errors("Weaver"):
            service = weaver.ServiceClient(base_url=self.base_url)
            service.connect()
            return service

    def _end(self, service: Client) -> None:
        with sdk_errors("Weaver"):
            service.close()

    def _new_training(self, service: Client) -> Client:
        options: Mapping[str, object] = {"training_mode": self.training_mode, "lora_config": {"rank": self.lora_rank}}
        with sdk_errors("Weaver"):
            return service.create_model(base_model=self.base_model, **options)

    def _new_sampling(self, service: Client, path: str | None) -> Client:
        source = {} if path is None else {"model_path": path}
        with sdk_errors("Weaver"):
            return service.create_sampling_client(base_model=self.base_model or None, **source)

    def _service_tokenizer(self) -> Tokenizer:
        return shared_tokenizer(self.get_sampling_client().tokenizer_path or self.base_model)


def _sample_of(ids: Sequence[int], sequence: Mapping[str, Any], versions: Sequence[int | str]) -> Sample:
    version = sequence.get("weight_version")
    versions = versions if version is None else (version,)
    record = TrainRecord(ids, sequence["tokens"], sequence.get("logprobs") or (), versions)
    return Sample(record, sequence.get("stop_reason") or "stop")


def _weaver() -> Any:
    """The SDK, which has no types."""
    try:
        return importlib.import_module("weaver")
    except ImportError:
        raise ImportError("WeaverServiceHolder needs the package nex-weaver: pip install nex-weaver") from None


def _params(sampling: Sampling) -> Any:
    return _weaver().types.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop),
        seed=sampling.seed,
    )

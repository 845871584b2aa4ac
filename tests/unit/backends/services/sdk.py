"""Stand-ins for the SDKs of training services: they answer with scripted texts and remember what they were asked."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.tokenizers_for_tests import byte_level

TOKENIZER = byte_level()
EOS = 2


def tokens_of(text: str | Sequence[str], ends: bool = True) -> list[int]:
    """The tokens of a text, or of its parts one after the other, with the end token."""
    parts = [text] if isinstance(text, str) else text
    ids = [token for part in parts for token in TOKENIZER.encode(part, add_special_tokens=False)]
    return [*ids, EOS] if ends else ids


@dataclass
class Sequenced:
    """One sampled sequence."""

    tokens: list[int]
    logprobs: list[float] | None
    stop_reason: str = "stop"


@dataclass
class Service:
    """What both stand-ins share: the answers, and the calls."""

    sequences: list[Sequenced] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    made: list[dict[str, Any]] = field(default_factory=list)
    error: Exception | None = None

    def answer(self, *texts: str | Sequence[str], stop_reason: str = "stop") -> None:
        """Give these texts from now on."""
        ids = [tokens_of(text, stop_reason == "stop") for text in texts]
        self.sequences = [Sequenced(tokens, [-0.5] * len(tokens), stop_reason) for tokens in ids]

    def take(self, call: dict[str, Any]) -> list[Sequenced]:
        """The answers to a call."""
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        return self.sequences


class Ready:
    """A future of Tinker that is done; it can be awaited too."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def result(self) -> Any:
        return self._result

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.sleep(0, self._result).__await__()


class TinkerSampling:
    def __init__(self, service: Service) -> None:
        self._service = service

    def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Ready:
        call = {"prompt": prompt.to_ints(), "num_samples": num_samples, **sampling_params.model_dump()}
        return Ready(SimpleNamespace(sequences=self._service.take(call)))

    def compute_logprobs(self, prompt: Any) -> Ready:
        return Ready([None, *[-0.5] * (prompt.length - 1)])

    def get_tokenizer(self) -> Any:
        return TOKENIZER


class TinkerTraining:
    def __init__(self, service: Service) -> None:
        self._service = service

    def forward_backward(self, data: Any, loss_fn: str, loss_fn_config: Any) -> Ready:
        self._service.made.append({"data": data, "loss_fn": loss_fn})
        return Ready("loss")

    def optim_step(self, params: Any) -> Ready:
        self._service.made.append(params.model_dump())
        return Ready("step")

    def save_weights_for_sampler(self, name: str) -> Ready:
        return Ready(SimpleNamespace(path=f"tinker://run/{name}"))


def tinker_with(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the SDK connect to this service."""
    import tinker

    class Client:
        def __init__(self, *, base_url: str | None = None) -> None:
            service.made.append({"base_url": base_url})

        def create_sampling_client(self, **source: str) -> Ready:
            service.made.append(source)
            return Ready(TinkerSampling(service))

        def create_lora_training_client(self, base_model: str, rank: int) -> Ready:
            service.made.append({"base_model": base_model, "rank": rank})
            return Ready(TinkerTraining(service))

        def close(self, status: str) -> Ready:
            service.made.append({"closed": True, "status": status})
            return Ready(None)

    monkeypatch.setattr(tinker, "ServiceClient", Client)


class _Fields(SimpleNamespace):
    """A record of keyword arguments."""


class _ModelInput(SimpleNamespace):
    @classmethod
    def from_ints(cls, tokens: list[int]) -> _ModelInput:
        return cls(tokens=list(tokens))


def weaver_with(service: Service, monkeypatch: pytest.MonkeyPatch, **result: Any) -> None:
    """A module in place of the SDK; `result` has further fields of a sampling result."""

    class Sampling:
        tokenizer_path = None

        def sample(self, *, prompt: Any, sampling_params: Any, num_samples: int) -> dict[str, Any]:
            sequences = service.take({"prompt": prompt.tokens, "num_samples": num_samples, **vars(sampling_params)})
            return {"sequences": [vars(sequence) for sequence in sequences], **result}

        def compute_logprobs(self, *, prompt: Any) -> list[float | None]:
            return [None, *[-0.5] * (len(prompt.tokens) - 1)]

    class Training:
        def save_weights_for_sampler(self, *, name: str) -> str:
            return f"weaver://run/{name}"

        def forward_backward(self, data: Any, loss_fn: str, *, loss_fn_config: Any) -> str:
            service.made.append({"data": data, "loss_fn": loss_fn})
            return "loss"

        def optim_step(self, params: Any) -> str:
            service.made.append(vars(params))
            return "step"

    class Client:
        def __init__(self, *, base_url: str | None = None) -> None:
            service.made.append({"base_url": base_url})

        def connect(self) -> None:
            service.made.append({"connected": True})

        def create_sampling_client(self, **source: Any) -> Sampling:
            service.made.append(source)
            return Sampling()

        def create_model(self, **options: Any) -> Training:
            service.made.append(options)
            return Training()

        def close(self) -> None:
            service.made.append({"closed": True})

    module: Any = ModuleType("weaver")
    module.ServiceClient = Client
    module.types = SimpleNamespace(ModelInput=_ModelInput, SamplingParams=_Fields, AdamParams=_Fields)
    monkeypatch.setitem(sys.modules, "weaver", module)

"""The service for the Tinker SDK over a tiny model, as a server in a thread of the test's process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from tinker import types

from penstock import InferenceEngine
from penstock.serving import ServingSettings, app
from penstock.serving.tinker import TinkerService, TinkerSettings
from penstock.training.lora.trainer import LoraTrainer
from tests.http_sockets import running
from tests.tiny_models import build

KEY = "tml-test"
TEXT = [5, 6, 7, 8, 9, 10, 11, 12]


@dataclass
class Running:
    """A server, and the parts of it that a test may look into."""

    url: str
    service: TinkerService
    engine: InferenceEngine
    module: Any
    clock: list[float]  # its first value is the time of the sessions

    def client(self, key: str = KEY) -> tinker.ServiceClient:
        """A client of a session of its own."""
        return tinker.ServiceClient(base_url=self.url, api_key=key)

    @property
    def model(self) -> str:
        """The base model's name."""
        return self.service.base_model


@contextmanager
def serving(
    folder: Path, settings: ServingSettings | None = None, weight_mode: str = "shared", **options: Any
) -> Iterator[Running]:
    """A service over a model of two layers."""
    module, clock = build("llama"), [0.0]
    fixed: dict[str, Any] = {"skip_tokenizer_init": True, "num_threads": 1, "batch_timeout_ms": 0, "block_size": 4}
    engine = InferenceEngine(module, weight_mode=weight_mode, **fixed)
    engine.start()
    try:
        trainer = LoraTrainer(module, max_length=512, tokens_per_pass=64)
        values = TinkerSettings(folder=folder, **options)
        service = TinkerService(engine, trainer, values, clock=lambda: clock[0])
        with running(app(engine, settings, tinker=service)) as server:
            port = server.servers[0].sockets[0].getsockname()[1]
            yield Running(f"http://127.0.0.1:{port}", service, engine, module, clock)
    finally:
        engine.stop(0)


@contextmanager
def rest_of(client: tinker.ServiceClient) -> Iterator[tinker.RestClient]:
    """What needs no session, over connections that are closed with the client; `RestClient()` never closes its own."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        yield client.create_rest_client()


def datum(tokens: Sequence[int], **inputs: Sequence[float]) -> types.Datum:
    """Tokens of which each is to be predicted from those before; other inputs are those of the loss."""
    values = {name: np.asarray(value, dtype=np.float32) for name, value in inputs.items()}
    fields: Any = {"target_tokens": np.asarray(tokens[1:], dtype=np.int64), **values}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=fields)


def supervised(tokens: Sequence[int] = TEXT) -> types.Datum:
    """Tokens to learn."""
    return datum(tokens, weights=[1.0] * (len(tokens) - 1))


def logprobs(training: tinker.TrainingClient, tokens: Sequence[int]) -> np.ndarray:
    """The log probability of each token after the first, by a forward pass."""
    output = training.forward([supervised(tokens)], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


def step(training: tinker.TrainingClient, data: Sequence[types.Datum], rate: float = 0.02) -> float:
    """One step of supervised training; the loss before it."""
    losses = training.forward_backward(list(data), "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=rate)).result()
    return losses.result().metrics["loss:sum"]


def prompt(tokens: Sequence[int]) -> types.ModelInput:
    """Tokens to continue."""
    return types.ModelInput.from_ints(list(tokens))

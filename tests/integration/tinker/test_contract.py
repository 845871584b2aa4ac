"""The Tinker SDK behind the `Engine` protocol, and the client of Tinker services, against the real service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from penstock import InferenceEngine, RequestError, SamplingParams, ScriptedModel
from penstock.api.protocols import Engine
from penstock.backends import RemoteApiInferenceServiceClient, TinkerEngine, TinkerServiceHolder
from penstock.serving import app
from penstock.serving.tinker import TinkerService, TinkerSettings
from penstock.testing.contract import EngineContract
from penstock.training.lora.records import LoraShape, TrainedAdapter
from tests.http_sockets import running
from tests.integration.tinker.service import KEY, TEXT, Running, logprobs, prompt, supervised
from tests.tokenizers_for_tests import byte_level


class NoTrainer:
    """A trainer for tests that train nothing."""

    def num_bytes(self, shape: LoraShape) -> int:
        return 0

    def create(self, shape: LoraShape) -> TrainedAdapter:
        raise RequestError("nothing is trained here")


class TestTinkerEngine(EngineContract):
    client: Any = None

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        model = ScriptedModel(lambda tokens, index: 40 + len(tokens) % 30, vocab_size=300)
        native = InferenceEngine(model, byte_level(), batch_timeout_ms=0)
        native.start()
        settings = TinkerSettings(folder=tmp_path_factory.mktemp("contract"))
        try:
            service = TinkerService(native, NoTrainer(), settings)
            with running(app(native, tinker=service)) as server:
                port = server.servers[0].sockets[0].getsockname()[1]
                with tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key=KEY) as client:
                    cls.client = client.create_sampling_client(base_model=service.base_model).result()
                    yield
        finally:
            native.stop(0)

    def make_engine(self) -> Engine:
        return TinkerEngine(self.client, byte_level(), piece=8)


async def test_pieces_of_a_completion_are_one_completion(server: Running, client: tinker.ServiceClient) -> None:
    sampling = client.create_sampling_client(base_model=server.model).result()
    params = SamplingParams(temperature=0.0, max_tokens=11, ignore_eos=True, logprobs=2)
    outputs = []
    for piece in (3, 100):
        async with TinkerEngine(sampling, piece=piece) as engine:
            outputs.append((await engine.generate(TEXT, params)).outputs[0])
    native = (await server.engine.generate(TEXT, params)).outputs[0]
    for output in outputs:
        assert output.token_ids == native.token_ids
        np.testing.assert_allclose(output.token_logprobs, native.token_logprobs, atol=1e-5)
        assert output.logprobs is not None
        assert native.logprobs is not None
        assert [set(each) for each in output.logprobs] == [set(each) for each in native.logprobs]


async def test_what_a_service_does_not_have_is_refused_by_name(server: Running, client: tinker.ServiceClient) -> None:
    sampling = client.create_sampling_client(base_model=server.model).result()
    async with TinkerEngine(sampling) as engine:
        for params, word in (
            (SamplingParams(min_p=0.1), "min_p"),
            (SamplingParams(max_tokens=None), "max_tokens"),
            (SamplingParams(stop="x", stop_token_ids=[3]), "stop_token_ids"),
        ):
            with pytest.raises(RequestError, match=word):
                engine.generate(TEXT, params)
        with pytest.raises(RequestError, match="Tinker"):
            await engine.generate([5, 100_000], SamplingParams(max_tokens=2))
        with pytest.raises(RequestError, match="token ids only"):
            await engine.generate("text", SamplingParams(max_tokens=2))


@pytest.fixture
def holder(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinkerServiceHolder]:
    """Its vocabulary is larger than the model's, so prompts are token ids."""
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    byte_level().save_pretrained(tmp_path)
    holder = TinkerServiceHolder(server.model, 4, server.url, tokenizer_path=str(tmp_path))
    yield holder
    holder.get_service_client().close("success").result()


def test_the_service_client_trains_saves_and_samples(server: Running, holder: TinkerServiceHolder) -> None:
    before = holder.sample_from_prompt(TEXT[:3], 6, temperature=0.0, num_samples=2)
    assert [len(sample["response_tokens"]) for sample in before["samples"]] == [6, 6]
    assert before["prompt_tokens"] == TEXT[:3]
    assert len(before["response_logprobs"]) == 6
    data = {"model_input": TEXT[:-1], "loss_fn_inputs": {"target_tokens": TEXT[1:], "weights": [1.0] * 7}}
    losses = []
    for _ in range(30):
        losses.append(holder.forward_backward([data], "cross_entropy").metrics["loss:sum"])
        holder.optim_step(0.01)
    assert losses[-1] < losses[0] / 10
    path = holder.save_weights_for_sampler("trained")
    holder.set_current_sampling_path(path)
    holder.update_sampling_client()
    after = holder.sample_from_prompt(TEXT[:3], 6, temperature=0.0)
    assert after["response_tokens"] != before["response_tokens"]
    tokens = [*TEXT[:3], *after["response_tokens"]]
    own = logprobs(holder.get_training_client(), tokens)
    np.testing.assert_allclose(after["response_logprobs"], own[2:], atol=1e-5)
    np.testing.assert_allclose(holder.compute_logprobs(tokens)[1:], own, atol=1e-5)
    with pytest.raises(RequestError, match="Tinker refused the request"):
        holder.sample_from_prompt([100_000], 2)


async def test_rollout_workers_get_records_from_the_service(
    server: Running, holder: TinkerServiceHolder, tmp_path: Path
) -> None:
    section = {"backend": "tinker", "model": server.model, "tokenizer": str(tmp_path), "base_url": server.url}
    client = RemoteApiInferenceServiceClient({"inference_service": section, "temperature": 0.7})
    calls = [client.acompletion(TEXT[:3], max_tokens=5, n=2) for _ in range(3)]
    for response in await asyncio.gather(*calls):
        assert len(response["choices"]) == 2
        record = response["nexrl_train"]
        assert record["prompt_tokens"] == TEXT[:3]
        assert len(record["response_tokens"]) == len(record["response_logprobs"]) > 0
    await client.aclose()


def test_the_sdks_future_is_that_of_the_batch(training: tinker.TrainingClient) -> None:
    """Many requests wait at once without a connection of each being lost."""
    futures = [training.forward([supervised()], "cross_entropy") for _ in range(20)]
    sampling = training.save_weights_and_get_sampling_client().result()
    samples = [sampling.sample(prompt(TEXT), 1, types.SamplingParams(max_tokens=3, stop=[])) for _ in range(40)]
    assert len({future.result().metrics["loss:sum"] for future in futures}) == 1
    assert all(len(sample.result().sequences[0].tokens) == 3 for sample in samples)

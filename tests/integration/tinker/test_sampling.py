"""Sampling through the unmodified Tinker SDK: log probabilities, what is told of a prompt, weights, cancelling."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from penstock.kernels import native
from tests.integration.tinker.service import TEXT, Running, logprobs, prompt, rest_of, serving, step, supervised

PROMPT = [5, 6, 7, 8, 9]


def table(server: Running, tokens: list[int]) -> np.ndarray:
    """The base model's log probabilities of every token after each of `tokens` but the last."""
    with torch.no_grad():
        logits = server.module(input_ids=torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).numpy()


@pytest.fixture
def base(server: Running, client: tinker.ServiceClient) -> tinker.SamplingClient:
    return client.create_sampling_client(base_model=server.model).result()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_logprobs_are_those_of_a_forward_pass(training: tinker.TrainingClient, temperature: float) -> None:
    """The model's own, whatever the temperature: a ratio to them is that of two models."""
    step(training, [supervised()])
    sampling = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=12, temperature=temperature, seed=3, top_p=0.9, stop=[])
    response = sampling.sample(prompt(PROMPT), 4, params).result()
    assert len({tuple(sequence.tokens) for sequence in response.sequences}) > 1
    for sequence in response.sequences:
        assert sequence.logprobs is not None
        assert (len(sequence.tokens), sequence.stop_reason) == (12, "length")
        own = logprobs(training, [*PROMPT, *sequence.tokens])[len(PROMPT) - 1 :]
        np.testing.assert_allclose(sequence.logprobs, own, atol=1e-5)
    assert len({sequence.sequence_id for sequence in response.sequences}) == 4


@pytest.mark.skipif(not native.available(), reason="no compiler")
def test_an_engine_with_packed_weights_samples_from_the_same_adapters(tmp_path: Path) -> None:
    with serving(tmp_path, weight_mode="packed") as server, server.client() as client:
        training = client.create_lora_training_client(server.model, rank=4, seed=1).result()
        step(training, [supervised()])
        sampling = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=12, seed=3, stop=[])
        (sequence,) = sampling.sample(prompt(PROMPT), 1, params).result().sequences
        own = logprobs(training, [*PROMPT, *sequence.tokens])[len(PROMPT) - 1 :]
        np.testing.assert_allclose(sequence.logprobs, own, atol=1e-4)


def test_what_is_asked_about_the_prompt_is_told(server: Running, base: tinker.SamplingClient) -> None:
    own = table(server, PROMPT)
    params = types.SamplingParams(max_tokens=2, temperature=0.0, stop=[])
    response = base.sample(
        prompt(PROMPT), 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=3, topk_sample_logprobs=2
    ).result()
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    chosen = own[np.arange(4), PROMPT[1:]]
    np.testing.assert_allclose(response.prompt_logprobs[1:], chosen, atol=1e-5)
    assert base.compute_logprobs(prompt(PROMPT)).result() == pytest.approx(response.prompt_logprobs, abs=1e-6)
    top: Any = response.topk_prompt_logprobs
    assert top[0] is None
    for row, entries in zip(own, top[1:], strict=True):
        assert [token for token, _ in entries] == list(np.argsort(-row)[:3])
        np.testing.assert_allclose([value for _, value in entries], np.sort(row)[::-1][:3], atol=1e-5)
    (sequence,) = response.sequences
    assert sequence.topk_logprobs is not None
    firsts = [entries[0] for entries in sequence.topk_logprobs if entries]
    assert [token for token, _ in firsts] == sequence.tokens
    assert [len(entries or ()) for entries in sequence.topk_logprobs] == [2, 2]


def test_only_the_end_of_a_prompt_is_scored_where_that_is_asked(base: tinker.SamplingClient) -> None:
    whole = base.compute_logprobs(prompt(PROMPT)).result()
    end = base.compute_logprobs(prompt(PROMPT), prompt_logprobs_last_n=2).result()
    assert end[:3] == [None] * 3
    assert end[3:] == pytest.approx(whole[3:])


@pytest.mark.parametrize("is_sparse", [False, True])
def test_log_probabilities_of_chosen_ids_at_chosen_places(
    server: Running, base: tinker.SamplingClient, is_sparse: bool
) -> None:
    tokens = [(7 * i) % 150 + 2 for i in range(80)]  # more places than are scored at once
    ids = torch.full((79, 2), -1)
    ids[2, 0], ids[2, 1], ids[70, 1] = 3, 4, 159
    target = types.TensorData.from_torch_sparse(ids, pad_value=-1) if is_sparse else types.TensorData.from_torch(ids)
    params = types.SamplingParams(max_tokens=1)
    response = base.sample(prompt(tokens), 1, params, target_prompt_logprobs=target).result()
    assert response.target_prompt_logprobs is not None
    values, own = response.target_prompt_logprobs.to_numpy(), table(server, tokens)
    expected = np.zeros((79, 2), dtype=np.float32)
    expected[2, 0], expected[2, 1], expected[70, 1] = own[2, 3], own[2, 4], own[70, 159]
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_alternatives_are_drawn_from_the_distribution_of_each_place(
    server: Running, base: tinker.SamplingClient
) -> None:
    own = table(server, PROMPT)
    for temperature in (1.0, 0.0, 1e-300):
        params = types.SamplingParams(max_tokens=1, temperature=temperature, seed=1)
        response = base.sample(prompt(PROMPT), 1, params, prompt_alt_tokens_k=200).result()
        assert response.prompt_alt_tokens is not None
        drawn = response.prompt_alt_tokens.tokens.to_numpy()
        values = response.prompt_alt_tokens.logprobs.to_numpy()
        np.testing.assert_allclose(values, np.take_along_axis(own, drawn, axis=1), atol=1e-5)
        if temperature == 1.0:
            likeliest = own.argmax(axis=1)
            frequency = (drawn == likeliest[:, None]).mean(axis=1)
            np.testing.assert_allclose(frequency, np.exp(own.max(axis=1)), atol=0.12)
        else:
            assert (drawn == own.argmax(axis=1)[:, None]).all()


def test_a_stop_token_ends_a_sample_and_an_empty_list_ends_none(base: tinker.SamplingClient) -> None:
    free = types.SamplingParams(max_tokens=20, temperature=0.0, stop=[])
    (whole,) = base.sample(prompt(PROMPT), 1, free).result().sequences
    assert (len(whole.tokens), whole.stop_reason) == (20, "length")
    stop = whole.tokens[4]
    stopped = types.SamplingParams(max_tokens=20, temperature=0.0, stop=[stop])
    (sequence,) = base.sample(prompt(PROMPT), 1, stopped).result().sequences
    first = whole.tokens.index(stop)
    assert (sequence.tokens, sequence.stop_reason) == (whole.tokens[: first + 1], "stop")


def test_a_snapshot_keeps_its_weights_and_an_inflight_sampler_follows_them(training: tinker.TrainingClient) -> None:
    snapshot = training.save_weights_and_get_sampling_client().result()
    inflight = training.save_weights_and_get_sampling_client(kind="inflight").result()
    before = snapshot.compute_logprobs(prompt(TEXT)).result()
    assert inflight.compute_logprobs(prompt(TEXT)).result() == before
    step(training, [supervised()])
    later = training.save_weights_and_get_sampling_client(kind="inflight").result()
    assert snapshot.compute_logprobs(prompt(TEXT)).result() == before
    for sampler in (inflight, later):
        (_, *after) = sampler.compute_logprobs(prompt(TEXT)).result()
        np.testing.assert_allclose(np.array(after, dtype=float), logprobs(training, TEXT), atol=1e-5)


def test_saved_weights_are_sampled_from_listed_and_deleted(
    client: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    step(training, [supervised()])
    path = training.save_weights_for_sampler("mine", ttl_seconds=3600).result().path
    state = training.save_state("state", user_metadata={"a": "b"}).result().path
    samplers = [client.create_sampling_client(model_path=each).result() for each in (path, state)]
    for sampler in samplers:
        (_, *values) = sampler.compute_logprobs(prompt(TEXT)).result()
        np.testing.assert_allclose(np.array(values, dtype=float), logprobs(training, TEXT), atol=1e-5)
    with rest_of(client) as rest:
        listed = rest.list_checkpoints(training.model_id).result().checkpoints
        assert {each.tinker_path: each.checkpoint_type for each in listed} == {path: "sampler", state: "training"}
        assert {each.tinker_path: each.user_metadata for each in listed} == {path: None, state: {"a": "b"}}
        assert [each.expires_at is None for each in listed if each.tinker_path == path] == [False]
        cursor = rest.list_user_checkpoints(limit=1).result().cursor
        assert cursor is not None
        assert cursor.total_count >= 2
        rest.delete_checkpoint_from_tinker_path(path).result()
        assert [each.tinker_path for each in rest.list_checkpoints(training.model_id).result().checkpoints] == [state]
    with pytest.raises(tinker.NotFoundError, match="there are no saved weights"):
        client.create_sampling_client(model_path=path).result()


def test_a_sampling_client_works_in_another_process(base: tinker.SamplingClient) -> None:
    """It is pickled with the address; a copy has ids of its own, so that its requests are not those of the first."""
    copy: tinker.SamplingClient = pickle.loads(pickle.dumps(base))
    params = types.SamplingParams(max_tokens=4, temperature=0.0)
    one, other = (each.sample(prompt(PROMPT), 1, params).result().sequences[0] for each in (base, copy))
    assert one.tokens == other.tokens
    assert one.sequence_id != other.sequence_id
    copy.holder.close()  # which keeps the session alive, too


def test_a_sample_that_nobody_waits_for_is_cancelled(server: Running, base: tinker.SamplingClient) -> None:
    future = base.sample(prompt(PROMPT), 1, types.SamplingParams(max_tokens=500, stop=[]))
    assert future.future().cancel()
    params = types.SamplingParams(max_tokens=2)
    assert len(base.sample(prompt(PROMPT), 1, params).result().sequences[0].tokens) <= 2


def test_adapters_that_nobody_uses_leave_the_engine_and_come_back(
    server: Running, training: tinker.TrainingClient
) -> None:
    limit = server.service.settings.max_loaded_adapters
    samplers, values = [], []
    for _ in range(limit + 2):
        samplers.append(training.save_weights_and_get_sampling_client().result())
        values.append(samplers[-1].compute_logprobs(prompt(TEXT)).result())
        training.forward_backward([supervised()], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=0.01)).result()
    assert len(server.engine.adapters) <= limit
    assert samplers[0].compute_logprobs(prompt(TEXT)).result() == values[0]
    assert values[0] != values[1]

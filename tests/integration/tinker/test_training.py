"""Training through the unmodified Tinker SDK: losses, steps, saved states, and what one session sees of another."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types

from tests.integration.tinker.service import TEXT, Running, datum, logprobs, prompt, rest_of, step, supervised

GREEDY = types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])


def test_the_service_tells_what_it_has(
    server: Running, client: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    with rest_of(client) as rest:
        (model, *_) = rest.get_server_capabilities().result().supported_models
    assert (model.model_name, model.max_context_length) == (server.model, 512)
    assert (model.trainable, model.sampleable) == (True, True)
    info = training.get_info()
    assert (info.model_data.model_name, info.is_lora, info.lora_rank) == (server.model, True, 4)
    assert info.model_id == training.model_id


def test_supervised_loss_falls_and_the_adapter_answers_with_what_it_learned(training: tinker.TrainingClient) -> None:
    losses = [step(training, [supervised()], rate=0.005) for _ in range(50)]
    assert losses[-1] < 0.2 < 5 < losses[0]
    sampling = training.save_weights_and_get_sampling_client().result()
    (sequence,) = sampling.sample(prompt(TEXT[:3]), 1, GREEDY).result().sequences
    assert sequence.tokens[: len(TEXT) - 3] == TEXT[3:]


def test_a_new_adapter_changes_nothing_and_seeds_make_the_same_adapter_again(
    server: Running, client: tinker.ServiceClient
) -> None:
    first, second, third = (
        client.create_lora_training_client(server.model, rank=3, seed=seed).result() for seed in (7, 7, 8)
    )
    with torch.no_grad():
        expected = server.module(input_ids=torch.tensor([TEXT])).logits[0, :-1].log_softmax(-1)
    own = expected.gather(1, torch.tensor(TEXT[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(logprobs(first, TEXT), own, atol=1e-5)
    for training in (first, second, third):
        step(training, [supervised()])
    np.testing.assert_array_equal(logprobs(first, TEXT), logprobs(second, TEXT))
    assert not np.allclose(logprobs(first, TEXT), logprobs(third, TEXT))


@pytest.mark.parametrize("layers", [("train_attn",), ("train_mlp",), ("train_unembed",)])
def test_only_the_layers_asked_for_are_trained(
    server: Running, client: tinker.ServiceClient, layers: tuple[str, ...]
) -> None:
    wanted = {name: name in layers for name in ("train_attn", "train_mlp", "train_unembed")}
    training = client.create_lora_training_client(server.model, rank=2, seed=1, **wanted).result()
    before = logprobs(training, TEXT)
    step(training, [supervised()])
    assert not np.allclose(logprobs(training, TEXT), before)
    path = training.save_weights_for_sampler("layers").result().path
    with rest_of(client) as rest:
        info = rest.get_weights_info_by_tinker_path(path).result()
    assert {name: getattr(info, name) for name in wanted} == wanted


def test_what_is_saved_to_sample_from_is_an_adapter_of_peft(server: Running, training: tinker.TrainingClient) -> None:
    step(training, [supervised()])
    training.save_weights_for_sampler("peft").result()
    folder = server.service.settings.folder / training.model_id / "sampler_weights" / "peft"
    adapted = PeftModel.from_pretrained(copy.deepcopy(server.module), folder)
    with torch.no_grad():
        own = adapted(input_ids=torch.tensor([TEXT])).logits[0, :-1].log_softmax(-1)
    expected = own.gather(1, torch.tensor(TEXT[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(logprobs(training, TEXT), expected, atol=1e-5)


def test_two_sessions_never_see_each_others_weights(server: Running) -> None:
    texts = [[5, 6, 7, 8, 9, 10], [5, 6, 30, 31, 32, 33]]
    with server.client() as one, server.client() as other:
        trainings = [
            client.create_lora_training_client(server.model, rank=4, seed=1).result() for client in (one, other)
        ]
        for _ in range(20):  # both at once
            waiting: list[Any] = []
            for training, text in zip(trainings, texts, strict=True):
                waiting.append(training.forward_backward([supervised(text)], "cross_entropy"))
                waiting.append(training.optim_step(types.AdamParams(learning_rate=0.01)))
            for future in waiting:
                future.result()
        samplers = [training.save_weights_and_get_sampling_client().result() for training in trainings]
        futures = [sampler.sample(prompt([5, 6]), 1, GREEDY) for _ in range(4) for sampler in samplers]
        for i, future in enumerate(futures):
            training, text = trainings[i % 2], texts[i % 2]
            (sequence,) = future.result().sequences
            assert sequence.tokens[:4] == text[2:]
            own = logprobs(training, [5, 6, *sequence.tokens])[1:]
            np.testing.assert_allclose(sequence.logprobs, own, atol=1e-5)
        base = one.create_sampling_client(base_model=server.model).result()
        (untrained,) = base.sample(prompt([5, 6]), 1, GREEDY).result().sequences
        with torch.no_grad():
            logits = server.module(input_ids=torch.tensor([[5, 6]])).logits
        assert untrained.tokens[0] == int(logits[0, -1].argmax())


def test_training_goes_on_from_a_saved_state_as_if_it_had_never_stopped(
    server: Running, client: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    for _ in range(3):
        step(training, [supervised()])
    path = training.save_state("state", user_metadata={"step": "3"}).result().path
    assert path == f"tinker://{training.model_id}/weights/state"
    restored = client.create_training_client_from_state_with_optimizer(path).result()
    fresh = client.create_training_client_from_state(path).result()
    assert restored.get_info().lora_rank == 4
    for one in (restored, fresh):
        np.testing.assert_array_equal(logprobs(one, TEXT), logprobs(training, TEXT))
    for one in (training, restored, fresh):
        step(one, [supervised()])
    np.testing.assert_array_equal(logprobs(restored, TEXT), logprobs(training, TEXT))
    assert not np.allclose(logprobs(fresh, TEXT), logprobs(training, TEXT), atol=1e-4)  # its moments are new


@pytest.mark.filterwarnings("ignore::FutureWarning:tinker.*", "ignore:DEPRECATED")
def test_a_model_goes_back_to_an_earlier_state(training: tinker.TrainingClient) -> None:
    path = training.save_state("before").result().path
    before = logprobs(training, TEXT)
    step(training, [supervised()])
    training.load_state_with_optimizer(path).result()
    np.testing.assert_array_equal(logprobs(training, TEXT), before)


def test_losses_have_the_values_and_gradients_of_their_formulas(training: tinker.TrainingClient) -> None:
    own = logprobs(training, TEXT)
    advantages, old = np.linspace(-1, 1, 7, dtype=np.float32), own - np.linspace(-0.5, 0.5, 7, dtype=np.float32)
    ratio = np.exp(own - old)
    clipped = np.clip(ratio, 0.7, 1.1)
    expected = {
        "importance_sampling": -(ratio * advantages).sum(),
        "ppo": -np.minimum(ratio * advantages, clipped * advantages).sum(),
        "cispo": -(clipped * advantages * own).sum(),
        "dro": -(own * advantages - 0.5 * 0.1 * (own - old) ** 2).sum(),
    }
    configs = {"ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}, "dro": {"beta": 0.1}}
    configs["cispo"] = configs["ppo"]
    data = [datum(TEXT, logprobs=old, advantages=advantages)]
    for name, value in expected.items():
        output = training.forward(data, name, configs.get(name)).result()
        assert output.metrics["loss:sum"] == pytest.approx(value, rel=1e-4)
        np.testing.assert_allclose(output.loss_fn_outputs[0]["logprobs"].to_numpy(), own, atol=1e-6)


def test_gradients_of_several_calls_add_up_to_those_of_one(server: Running, client: tinker.ServiceClient) -> None:
    """Long batches are cut into several passes, and the SDK cuts them into several requests."""
    texts = [TEXT[:n] for n in (8, 5, 3)] * 8 + [[9] * 70]
    one, several = (client.create_lora_training_client(server.model, rank=4, seed=3).result() for _ in range(2))
    outputs = one.forward_backward([supervised(text) for text in texts], "cross_entropy").result()
    for text in texts:
        several.forward_backward([supervised(text)], "cross_entropy").result()
    norms = [each.optim_step(types.AdamParams(learning_rate=0.01)).result().metrics for each in (one, several)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    lengths = [len(output["logprobs"].data) for output in outputs.loss_fn_outputs]
    assert lengths == [len(text) - 1 for text in texts]
    np.testing.assert_allclose(logprobs(one, TEXT), logprobs(several, TEXT), atol=1e-4)


def test_steps_are_those_of_adamw(training: tinker.TrainingClient) -> None:
    """A clipped gradient, and one without any data, which only decays the weights and moments."""
    losses = [step(training, [supervised()]) for _ in range(2)]
    assert losses[1] < losses[0]
    before = logprobs(training, TEXT)
    training.optim_step(types.AdamParams(learning_rate=0.0)).result()
    np.testing.assert_array_equal(logprobs(training, TEXT), before)
    training.forward_backward([supervised()], "cross_entropy")
    metrics = training.optim_step(types.AdamParams(learning_rate=0.0, grad_clip_norm=1e-3)).result().metrics
    assert metrics is not None
    assert metrics["grad_norm"] > 1


def test_a_loss_of_the_client_trains_too(training: tinker.TrainingClient) -> None:
    def loss(data: list[types.Datum], outputs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = sum(((output + 1.0) ** 2).sum() for output in outputs)
        assert isinstance(total, torch.Tensor)
        return total, {"mine": float(total.detach())}

    values = []
    for _ in range(15):
        future = training.forward_backward_custom([supervised()], loss)
        training.optim_step(types.AdamParams(learning_rate=0.01))
        values.append(future.result().metrics["mine"])
    assert values[-1] < values[0] / 2


def test_a_position_may_have_several_targets_and_sparse_weights(training: tinker.TrainingClient) -> None:
    ids = torch.stack([torch.tensor(TEXT[1:]), torch.full((7,), 3)], dim=1)
    weights = torch.zeros(7, 2)
    weights[3, 1] = 2.0
    inputs: Any = {
        "target_tokens": types.TensorData.from_torch(ids),
        "weights": types.TensorData.from_torch_sparse(weights),
    }
    assert inputs["weights"].sparse_crow_indices is not None
    output = training.forward([types.Datum(prompt(TEXT[:-1]), inputs), supervised()], "cross_entropy").result()
    first, second = (record["logprobs"].to_numpy() for record in output.loss_fn_outputs)
    assert first.shape == (7, 2)
    np.testing.assert_allclose(first[:, 0], second, atol=1e-6)
    assert output.metrics["loss:sum"] == pytest.approx(-2 * first[3, 1] - second.sum(), rel=1e-5)


def test_a_loop_of_reinforcement_learning_raises_its_reward(server: Running, client: tinker.ServiceClient) -> None:
    """Groups of samples, advantages within each group, importance sampling, one step per round."""
    training = client.create_lora_training_client(server.model, rank=4, seed=2).result()
    rewards = []
    for _ in range(10):
        sampling = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=6, temperature=1.0, stop=[], seed=len(rewards))
        groups = [(start, sampling.sample(prompt(start), 8, params)) for start in ([5, 6], [7, 8, 9])]
        data, scores = [], []
        for start, future in groups:
            sequences = future.result().sequences
            own = np.array([np.mean([token % 2 for token in sequence.tokens]) for sequence in sequences])
            scores.append(own.mean())
            for sequence, advantage in zip(sequences, own - own.mean(), strict=True):
                zeros = [0.0] * (len(start) - 1)
                lengths = len(sequence.tokens)
                inputs = {
                    "logprobs": [*zeros, *(sequence.logprobs or ())],
                    "advantages": [*zeros, *[advantage] * lengths],
                }
                data.append(datum([*start, *sequence.tokens], **inputs))
        training.forward_backward(data, "importance_sampling")
        training.optim_step(types.AdamParams(learning_rate=0.02)).result()
        rewards.append(float(np.mean(scores)))
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2

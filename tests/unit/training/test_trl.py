"""What TRL's trainers ask of their generator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock import ConfigurationError, InferenceEngine, RequestError, RequestTooLarge, SamplingParams, ScriptedModel
from penstock.training.trl import EngineGeneration, generate_with, params_of
from tests.drive import greedy_by_transformers
from tests.tiny_models import build

SETTINGS = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": None, "repetition_penalty": 1.1}


@pytest.fixture
def engine() -> Iterator[InferenceEngine]:
    engine = InferenceEngine(ScriptedModel([5, 6, 7]), batch_timeout_ms=0)
    yield engine
    engine.stop(0)


def trainer_of(**changes: Any) -> SimpleNamespace:
    args = SimpleNamespace(seed=3)
    return SimpleNamespace(**{"use_vllm": False, "args": args, "max_completion_length": 4, **SETTINGS, **changes})


def test_t13_prompts_that_are_repeated_already_give_one_row_each(engine: InferenceEngine) -> None:
    """They were expanded once more: a group of n became one of n times n."""
    params = SamplingParams(max_tokens=2, logprobs=0, detokenize=False)
    prompts = [[1, 2], [1, 2], [3], [3]]
    rows = EngineGeneration(engine, params, seed=0).generate(prompts, None, num_generations=2)
    assert rows[0] == prompts
    assert [len(row) for row in rows[1]] == [2, 2, 2, 2]
    assert [[len(entry) for entry in row] for row in rows[2]] == [[1, 1]] * 4
    assert rows[3] == [[[token] for token in row] for row in rows[1]]


def test_t14_rows_keep_their_order_over_calls_and_the_module_its_config() -> None:
    """The second batch lost rows elsewhere, and the module was left with another attention."""
    model = build("llama").train()
    before = model.config.to_dict()
    engine = InferenceEngine(model, skip_tokenizer_init=True, num_threads=1, batch_timeout_ms=0)
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, detokenize=False, ignore_eos=True)
    generation = EngineGeneration(engine, params, seed=0)
    prompts = [[5 + i % 7] * (3 + i % 5) for i in range(12)]
    expected = [greedy_by_transformers(copy.deepcopy(model).eval(), prompt, 8) for prompt in prompts]
    for _ in range(3):
        rows = generation.generate(prompts, None, num_generations=1)
        assert (rows[0], rows[1]) == (prompts, expected)
        generation.sync_weights()
    engine.stop(0)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "eager"
    assert model.training


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.2}], ids=["none", "some"])
def test_log_probabilities_are_those_that_the_trainers_compute(temperature: float, filters: dict[str, Any]) -> None:
    """With top-p, each ratio of GRPO was the kept mass of all tokens: 0.18 for 16 tokens, and the loss almost 0."""
    model = build("llama")
    engine = InferenceEngine(model, skip_tokenizer_init=True, num_threads=1, batch_timeout_ms=0)
    params = SamplingParams(temperature=temperature, max_tokens=8, logprobs=0, detokenize=False, **filters)
    prompts = [[5, 6, 7], [5, 6, 7], [9]]
    _, completions, rows, _ = EngineGeneration(engine, params, seed=0).generate(prompts, None, num_generations=1)
    engine.stop(0)
    for prompt, completion, row in zip(prompts, completions, rows, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])
        torch.testing.assert_close(torch.tensor(row), expected, atol=1e-5, rtol=0)


def test_each_optimizer_step_is_a_version_of_the_weights(engine: InferenceEngine) -> None:
    generation = EngineGeneration(engine, SamplingParams(max_tokens=1, logprobs=0), seed=0)
    generation.sync_weights()
    generation.sync_weights()
    assert engine.weight_version == 2


def test_the_queue_holds_the_batch_of_a_trainer_unless_it_is_limited() -> None:
    """A batch of more than 1000 prompts raised `EngineOverloaded` in the middle of the training."""
    trainer = trainer_of(model=ScriptedModel([5]), processing_class=None)
    with generate_with(trainer) as engine:
        assert (engine.config.max_queue_size, engine.config.max_sequence_length) == (1_000_000, None)
    with generate_with(trainer, max_num_queued_reqs=50, max_model_len=64) as engine:
        assert (engine.config.max_queue_size, engine.config.max_sequence_length) == (50, 64)


def test_completions_end_where_the_model_s_length_does() -> None:
    """A prompt near the limit, as after a few results of tools, raised `RequestTooLarge` and ended the training."""
    trainer = trainer_of(model=ScriptedModel([5, 6, 7]), processing_class=None)
    with generate_with(trainer, max_sequence_length=16) as engine:
        rows = EngineGeneration(engine, params_of(trainer), seed=0).generate([[1] * 10, [1] * 14], None, 1)
        assert [len(row) for row in rows[1]] == [4, 2]
        with pytest.raises(RequestTooLarge, match="shorten the prompt"):
            EngineGeneration(engine, params_of(trainer), seed=0).generate([[1] * 16], None, 1)


def test_images_are_refused(engine: InferenceEngine) -> None:
    with pytest.raises(RequestError, match="text alone"):
        EngineGeneration(engine, SamplingParams(), seed=0).generate([[1]], [["image"]], 1)


def test_sampling_follows_the_trainer() -> None:
    params = params_of(trainer_of())
    assert (params.temperature, params.top_p, params.repetition_penalty, params.max_tokens) == (0.7, 0.9, 1.1, 4)
    assert (params.top_k, params.min_p, params.logprobs) == (0, 0.0, 0)


@pytest.mark.parametrize(
    "trainer", [object(), trainer_of(use_vllm=True), trainer_of(rollout_func=print)], ids=["other", "vllm", "rollout"]
)
def test_a_trainer_with_another_generator_is_refused(trainer: object) -> None:
    with pytest.raises(ConfigurationError, match="use_vllm=False"), generate_with(trainer):
        pass


def test_the_trainer_is_left_as_it_was() -> None:
    """It kept the stopped engine, and settings of a server that it never had."""
    trainer = trainer_of(model=ScriptedModel([5]), processing_class=None, _last_loaded_step=7)
    before = dict(vars(trainer))
    with pytest.raises(ZeroDivisionError), generate_with(trainer):
        raise ZeroDivisionError
    assert vars(trainer) == before

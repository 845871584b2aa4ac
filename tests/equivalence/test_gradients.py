"""Scores with gradients against autograd through plain forward passes, one pair at a time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError, RequestError, RequestTooLarge
from penstock.models.gradients.scorer import DifferentiableScorer
from penstock.scores import DifferentiableScore
from tests.tiny_models import ARCHITECTURES, VOCAB, build

Pair = tuple[list[int], list[int]]

_random = np.random.default_rng(0)


def ids(count: int) -> list[int]:
    return [int(token) for token in _random.integers(2, VOCAB, count)]


PROMPT = ids(20)
PAIRS: list[Pair] = [
    *((PROMPT, ids(count)) for count in (1, 5, 17)),  # a group with a shared prompt, longer than the windows of 8
    (ids(7), ids(9)),
    (PROMPT[:10], PROMPT[10:16] + ids(2)),  # goes on as the prompt does, for a while
    (PROMPT, []),
]


def weighted(logprobs: Sequence[Tensor]) -> Tensor:
    """A loss in which every token has a weight of its own."""
    return torch.cat([values * torch.linspace(-1, 1, len(values)) for values in logprobs]).sum()


def plain_logprobs(model: nn.Module, pairs: Sequence[Pair], temperature: float = 1.0) -> list[Tensor]:
    logprobs = []
    for prompt, completion in pairs:
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].float() / temperature
        predicting = logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) + len(completion) - 1]
        logprobs.append(predicting.gather(-1, torch.tensor(completion, dtype=torch.int64)[:, None])[:, 0])
    return logprobs


def scored(
    model: nn.Module, pairs: Sequence[Pair] = PAIRS, *, share_prefixes: bool = True, **options: Any
) -> list[Tensor]:
    scores = DifferentiableScorer(model, **options).score(*split(pairs), share_prefixes=share_prefixes)
    return [score.logprobs for score in scores]


def split(pairs: Sequence[Pair]) -> tuple[list[list[int]], list[list[int]]]:
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def gradients(model: nn.Module, logprobs: Sequence[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    weighted(logprobs).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-5 of each parameter's largest gradient."""
    assert actual.keys() == expected.keys()
    errors = {
        name: float((actual[name] - gradient).abs().max() / gradient.abs().max().clamp(min=0.1))
        for name, gradient in expected.items()
    }
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_gradients_are_those_of_plain_forward_passes(architecture: str) -> None:
    model = build(architecture)
    expected = plain_logprobs(model, PAIRS)
    actual = scored(model)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert_equal_gradients(gradients(model, actual), gradients(model, expected))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_a_shared_prompt_forward_once_gives_what_separate_ones_give(architecture: str) -> None:
    model = build(architecture)
    expected = gradients(model, scored(model, share_prefixes=False))
    assert_equal_gradients(gradients(model, scored(model)), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_checkpointed_layers_and_small_chunks_of_logits_change_nothing(architecture: str) -> None:
    model = build(architecture)
    expected = gradients(model, scored(model))
    frugal = scored(model, checkpoint_layers=True, logits_chunk_bytes=4 * VOCAB * 7)
    assert_equal_gradients(gradients(model, frugal), expected)


def test_temperature_and_entropy_are_those_of_the_tempered_distribution() -> None:
    model = build("llama")
    scores = DifferentiableScorer(model).score(*split(PAIRS), temperature=0.7)
    torch.testing.assert_close(
        [score.logprobs for score in scores], plain_logprobs(model, PAIRS, 0.7), atol=1e-5, rtol=0
    )
    prompt, completion = PAIRS[0]
    logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(
        scores[0].entropies, torch.distributions.Categorical(logits=logits / 0.7).entropy()[None], atol=1e-5, rtol=0
    )
    assert len(completion) == 1


def test_the_gradients_of_an_adapter_are_peft_s_own() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    expected = gradients(model, plain_logprobs(model, PAIRS))
    assert all("lora" in name for name in expected)
    assert_equal_gradients(gradients(model, scored(model)), expected)


def test_layers_that_the_owner_checkpoints_get_gradients_over_frozen_embeddings() -> None:
    """A reentrant checkpoint gave the layers below the first trained one none, and adapters no gradient at all."""
    model = build("llama").train()
    model.get_input_embeddings().requires_grad_(False)
    model.enable_input_require_grads()
    expected = gradients(model, plain_logprobs(model, PAIRS))
    model.activation_checkpointing_enable({"use_reentrant": True})
    assert_equal_gradients(gradients(model, scored(model)), expected)


def test_masked_tokens_have_no_gradient() -> None:
    """An environment mask that was ignored trained the model on tokens that it had not written."""
    model = build("llama")
    half = [(prompt, completion[: len(completion) // 2]) for prompt, completion in PAIRS]
    expected = gradients(model, scored(model, half))
    model.zero_grad()
    weights = [torch.linspace(-1, 1, len(completion)) for _, completion in half]
    masked = [torch.cat([w, torch.zeros(len(pair[1]) - len(w))]) for w, pair in zip(weights, PAIRS, strict=True)]
    torch.cat([lp * mask for lp, mask in zip(scored(model), masked, strict=True)]).sum().backward()
    actual = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert_equal_gradients(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_engine_s_values_the_ratio_is_exactly_one(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    values = [np.linspace(-3, -1, len(completion), dtype=np.float32) for _, completion in PAIRS]
    scores = DifferentiableScorer(model).score(*split(PAIRS), values=values)
    for score, value in zip(scores, values, strict=True):
        assert torch.equal((score.logprobs.detach() - torch.from_numpy(value)).exp(), torch.ones(len(value)))
        assert score.drift is not None
        assert not score.drift.requires_grad
    expected = gradients(model, scored(model))
    actual = gradients(model, [score.logprobs for score in scores])
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_dropout_acts_in_train_mode_only() -> None:
    model = build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.0)
    assert torch.equal(torch.cat(scored(model)), torch.cat(scored(model)))
    model.train()
    assert not torch.allclose(torch.cat(scored(model)), torch.cat(scored(model)), atol=1e-2)
    assert all(part.training for part in model.modules())


def test_the_owner_s_module_is_left_as_it_was() -> None:
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: dict(vars(part)) for name, part in model.named_modules()}
    weighted(scored(model, checkpoint_layers=True)).backward()
    assert model.config._attn_implementation == "eager"
    assert {name: dict(vars(part)) for name, part in model.named_modules()} == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_gradients_enabled_there_is_no_graph() -> None:
    with torch.no_grad():
        assert not any(values.requires_grad for values in scored(build("llama")))


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "words"),
    [
        ([[1]], [], {}, "one completion per prompt"),
        ([], [], {}, "one completion per prompt"),
        ([[]], [[1]], {}, "prompt 0 is empty"),
        ([["a"]], [[1]], {}, "token ids"),
        ([[1.5]], [[1]], {}, "token ids"),
        ([[1]], [[VOCAB]], {}, "vocabulary"),
        ([[-1]], [[1]], {}, "vocabulary"),
        ([[1]], [[1]], {"temperature": 0}, "temperature"),
        ([[1]], [[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], [[1]], {"values": [[]]}, "one number for every token"),
        ([[1]], [[1]], {"values": []}, "one number for every token"),
    ],
)
def test_bad_pairs_are_refused(prompts: Any, completions: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        DifferentiableScorer(build("llama")).score(prompts, completions, **options)


def test_a_distributed_module_is_refused_with_the_remedy() -> None:
    class FSDPModule(nn.Module):
        """Named as the mixin that fully_shard adds."""

    model = build("llama")
    model.get_submodule("model.norm").__class__ = type(
        "FSDPLlamaRMSNorm", (type(model.get_submodule("model.norm")), FSDPModule), {}
    )
    with pytest.raises(ConfigurationError, match="its own forward pass"):
        DifferentiableScorer(model)


def test_scores_are_kept_one_per_pair_in_order() -> None:
    scores = DifferentiableScorer(build("llama")).score(*split(PAIRS))
    assert all(isinstance(score, DifferentiableScore) for score in scores)
    assert [len(score.logprobs) for score in scores] == [len(completion) for _, completion in PAIRS]


def test_a_view_of_checkpointed_layers_does_not_wait_for_garbage_collection() -> None:
    """Its layers referred to themselves, and so activations without a backward pass stayed in memory."""
    model = build("llama")

    def num_modules() -> int:
        return sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects())

    scored(model, checkpoint_layers=True)  # what is kept for good is made now
    gc.collect()
    gc.disable()
    try:
        count = num_modules()
        scored(model, checkpoint_layers=True)
        assert num_modules() == count
    finally:
        gc.enable()


def test_logits_with_gradients_have_the_limit_of_scores() -> None:
    scorer = DifferentiableScorer(build("llama"), max_length=4)
    for compute in (scorer.score, scorer.logits):
        with pytest.raises(RequestTooLarge, match="5 tokens and the limit is 4"):
            compute([[1, 2, 3]], [[4, 5]])

"""Adapters in training: losses and gradients are those of peft over plain transformers, one sequence at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from penstock import ConfigurationError, RequestError, WeightsError
from penstock.training.lora.records import Adam, Datum, LoraShape, LossBatch
from penstock.training.lora.trainer import LoraTrainer
from tests.tiny_models import build

RNG = np.random.default_rng(0)
PREFIX = RNG.integers(2, 150, 9)
OTHERS = RNG.integers(2, 150, 20)
SEQUENCES = [np.concatenate([PREFIX, RNG.integers(2, 150, n)]) for n in (5, 1, 8)] + [RNG.integers(2, 150, 4)]


def batch() -> LossBatch:
    """Sequences of which three begin alike, and one whose targets are not the tokens that follow."""
    data = []
    for number, tokens in enumerate(SEQUENCES):
        targets = tokens[1:] if number != 2 else OTHERS[: len(tokens) - 1]
        weights = np.linspace(-0.5, 1, len(targets), dtype=np.float32)
        data.append(Datum(tokens[:-1], {"target_tokens": targets, "weights": weights}))
    return LossBatch(data, "cross_entropy")


def oracle(module: Any, data: list[Datum]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the log probabilities of a plain model, one sequence at a time."""
    logprobs = []
    for datum in data:
        logits = module(input_ids=torch.from_numpy(datum.tokens)[None], use_cache=False).logits[0].float()
        targets = torch.from_numpy(datum.inputs["target_tokens"])[:, None]
        logprobs.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
    weights = [torch.from_numpy(datum.inputs["weights"]) for datum in data]
    pairs = zip(logprobs, weights, strict=True)
    return -torch.stack([(own * weight).sum() for own, weight in pairs]).sum(), logprobs


def frozen(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("tokens_per_pass", [4, 40])  # 4: each alone, with layers that are computed again
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gemma2", "mixtral"])
def test_training_is_that_of_peft(architecture: str, tokens_per_pass: int, tmp_path: Path) -> None:
    module = build(architecture)
    before = frozen(module)
    model = LoraTrainer(module, tokens_per_pass=tokens_per_pass).create(LoraShape(rank=3, seed=1))
    whole = batch()
    for _ in range(2):  # b is zero at first, and so are the gradients of a
        model.forward_backward(whole)
        model.step(Adam(learning_rate=0.01))
    model.save(tmp_path, optimizer=False)
    adapted = PeftModel.from_pretrained(copy.deepcopy(module), tmp_path, is_trainable=True).eval()
    loss, logprobs = oracle(adapted, list(whole.data))
    result = model.forward_backward(whole)
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for own, expected in zip(result.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(own, expected.detach().numpy(), atol=1e-5)
    loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    assert model.step(Adam(learning_rate=0.01)) == pytest.approx(norm, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_steps_are_those_of_torchs_adamw(tmp_path: Path) -> None:
    module = build("llama")
    model = LoraTrainer(module).create(LoraShape(rank=2, seed=1))
    model.save(tmp_path, optimizer=False)
    adapted = PeftModel.from_pretrained(copy.deepcopy(module), tmp_path, is_trainable=True).eval()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    whole = batch()
    for _ in range(3):
        model.forward_backward(whole)
        model.step(Adam(0.01, 0.8, 0.9, 1e-6, 0.1, grad_clip_norm=0.5))
        optimizer.zero_grad()
        oracle(adapted, list(whole.data))[0].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    with torch.no_grad():
        loss, _ = oracle(adapted, list(whole.data))
    assert model.forward(whole).loss == pytest.approx(float(loss), rel=1e-4)


def test_adapters_of_one_module_do_not_change_each_other_nor_the_module() -> None:
    module = build("llama").to(torch.bfloat16)
    before, trainer = frozen(module), LoraTrainer(module)
    first, second = trainer.create(LoraShape(rank=2, seed=1)), trainer.create(LoraShape(rank=5, seed=2))
    untrained = second.forward(batch()).loss
    for _ in range(20):
        first.forward_backward(batch())
        first.step(Adam(learning_rate=0.01))
    assert first.forward(batch()).loss < untrained
    assert second.forward(batch()).loss == untrained
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.parameters())


def test_gradients_whose_squares_overflow_are_dropped_and_leave_no_trace() -> None:
    """AdamW kept an infinite sum of squares, after which no step changed the adapter any more."""
    model = LoraTrainer(build("llama")).create(LoraShape(rank=2, seed=1))
    tokens = SEQUENCES[0]
    weights = np.full(len(tokens) - 1, 1e25, dtype=np.float32)
    model.forward_backward(
        LossBatch([Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})], "cross_entropy")
    )
    with pytest.raises(RequestError, match="norm of the gradients is not finite"):
        model.step(Adam())
    before = model.forward(batch()).loss
    for _ in range(2):
        model.forward_backward(batch())
        model.step(Adam(learning_rate=0.01, eps=1e-30))
    assert model.forward(batch()).loss < before


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no output head"):
        LoraTrainer(nn.Linear(2, 2))
    trainer = LoraTrainer(build("llama"), max_length=8)
    for values in ({"rank": 0}, {"rank": 513}, {"rank": 1.5}, {"rank": 1, "seed": "x"}, {"rank": 1, "train_mlp": 2}):
        with pytest.raises(RequestError):
            LoraShape(**values)  # type: ignore[arg-type]
    nothing = {"train_attn": False, "train_mlp": False, "train_unembed": False}
    with pytest.raises(RequestError, match="must change something"):
        LoraShape(1, **nothing)
    for adam in ({"learning_rate": float("nan")}, {"beta1": 1.0}, {"beta2": -1}, {"eps": "x"}, {"eps": 0.0}):
        with pytest.raises(RequestError):
            Adam(**adam)  # type: ignore[arg-type]
    model = trainer.create(LoraShape(rank=2))
    with pytest.raises(RequestError, match="at most 8"):
        model.forward(batch())
    with pytest.raises(RequestError, match="no data"):
        model.forward(LossBatch([], "cross_entropy"))
    with pytest.raises(WeightsError, match="cannot be read"):
        model.load(tmp_path, optimizer=False)
    model.save(tmp_path, optimizer=False)
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in _tensors(tmp_path).items()}
    _write(tmp_path, tensors)
    with pytest.raises(WeightsError, match="is not finite"):
        model.load(tmp_path, optimizer=False)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors")

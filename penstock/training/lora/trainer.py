"""`LoraTrainer`: trains LoRA adapters of one frozen module, beside an engine that borrows it.

Owns no weight of the module and computes on the caller's thread. An adapter's gradients are summed until its next step.
Implements the protocols of `records`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.errors import ConfigurationError, RequestError, WeightsError, described
from penstock.models.checks import vocab_size
from penstock.models.gradients.scorer import DifferentiableScorer
from penstock.models.wrappers import unwrapped
from penstock.training.lora.adapter import LoraAdapter, num_parameters
from penstock.training.lora.losses import Loss, check_data, loss_of, summed
from penstock.training.lora.records import LORA_ALPHA, Adam, Datum, LoraShape, LossBatch, LossResult

TOKENS_PER_PASS = 1024
ADAPTER_FILE, CONFIG_FILE, OPTIMIZER_FILE = "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, for each parameter; beside the number of steps


class LoraTrainer:
    """Makes adapters of `module`, which is frozen: its parameters want no gradients from here on.

    A datum has at most `max_length` tokens. `tokens_per_pass` bounds the tokens whose activations exist at once: a
    longer datum goes alone, and its layers are computed again in the backward pass. Raises `ConfigurationError` for a
    module that cannot be trained this way.
    """

    def __init__(
        self, module: nn.Module, *, max_length: int | None = None, tokens_per_pass: int = TOKENS_PER_PASS
    ) -> None:
        module = unwrapped(module)
        if not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
            raise ConfigurationError(f"{type(module).__name__} has no output head: pass a causal language model")
        self.module = module.requires_grad_(False).eval()
        self.max_length = max_length
        self.tokens_per_pass = tokens_per_pass
        DifferentiableScorer(module)  # refuses what it cannot run

    def num_bytes(self, shape: LoraShape) -> int:
        """The bytes of such an adapter in training: float32 matrices, gradients and the two moments of AdamW."""
        return 4 * 4 * num_parameters(self.module, shape)

    def create(self, shape: LoraShape) -> LoraModel:
        """A new adapter, which changes nothing yet. Raises `RequestError`."""
        return LoraModel(self, LoraAdapter(self.module, shape))


class LoraModel:
    """An adapter in training, with the state of AdamW, and its gradients. Made by `LoraTrainer`."""

    def __init__(self, trainer: LoraTrainer, adapter: LoraAdapter) -> None:
        self._trainer = trainer
        self._adapter = adapter
        self._parameters = adapter.parameters()
        self._optimizer = torch.optim.AdamW(self._parameters, foreach=True)
        self._is_incomplete = False

    @property
    def shape(self) -> LoraShape:
        """Which layers it changes."""
        return self._adapter.shape

    def forward(self, batch: LossBatch) -> LossResult:
        """The losses. Raises `RequestError`."""
        loss = self._checked(batch)
        with torch.no_grad():
            results = [self._pass(part, loss, batch) for part in self._parts(batch.data)]
        return _result(results)

    def forward_backward(self, batch: LossBatch) -> LossResult:
        """The losses, whose gradients are added to those since the last step. Raises `RequestError`."""
        try:
            loss = self._checked(batch)
            sums = [torch.zeros_like(parameter) for parameter in self._parameters]
            results: list[tuple[Tensor, list[Tensor]]] = []
            with torch.enable_grad():
                for part in self._parts(batch.data):
                    total, logprobs = self._pass(part, loss, batch)
                    gradients = torch.autograd.grad(total, self._parameters)
                    torch._foreach_add_(sums, list(gradients))
                    results.append((total.detach(), [tensor.detach() for tensor in logprobs]))
            self._accumulate(sums)
        except BaseException:
            self.mark_incomplete()
            raise
        return _result(results)

    def mark_incomplete(self) -> None:
        """Refuse the next step, as after an error: a part of its data is missing."""
        self._is_incomplete = True

    def step(self, adam: Adam) -> float:
        """Change the weights; returns the norm of the gradients. Raises `RequestError`."""
        if self._is_incomplete:
            self._drop_gradients()
            raise RequestError(
                "a forward_backward since the last step failed or never arrived, so the gradients are incomplete and "
                "were dropped: send the data of this step again"
            )
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in self._parameters])
        if not bool(norm.isfinite()):  # squares overflow before gradients do, and AdamW sums them up
            self._drop_gradients()
            raise RequestError("the norm of the gradients is not finite: lower the weights or the advantages")
        if adam.grad_clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, adam.grad_clip_norm, norm)
        for group in self._optimizer.param_groups:
            group.update(lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps)
            group.update(weight_decay=adam.weight_decay)
        self._optimizer.step()
        self._drop_gradients()
        return float(norm)

    def save(self, folder: Path, *, optimizer: bool) -> None:
        """Write the adapter to an existing folder, as peft writes it, and with `optimizer` its state."""
        from safetensors.torch import save_file

        module = self._trainer.module
        save_file({name: matrix.detach() for name, matrix in self._adapter.tensors().items()}, folder / ADAPTER_FILE)
        config = {
            **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.shape.rank, "lora_alpha": LORA_ALPHA},
            **{"target_modules": sorted(self._adapter.layers), "bias": "none", "inference_mode": True},
            "fan_in_fan_out": any(hasattr(module.get_submodule(path), "nf") for path in self._adapter.layers),
            "base_model_name_or_path": getattr(module.config, "name_or_path", ""),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        if optimizer:
            save_file(dict(self._optimizer_tensors()), folder / OPTIMIZER_FILE)

    def load(self, folder: Path, *, optimizer: bool) -> None:
        """Take the weights from a folder, and with `optimizer` its state, which is new otherwise.

        Drops gradients. Raises `WeightsError`, and then nothing has changed.
        """
        from safetensors.torch import load_file

        try:
            tensors = load_file(folder / ADAPTER_FILE)
            state = load_file(folder / OPTIMIZER_FILE) if optimizer else {}
        except Exception as error:
            raise WeightsError(f"the saved adapter cannot be read: {described(error)}") from error
        self._adapter.take(tensors)
        self._optimizer.state.clear()
        for i, parameter in enumerate(self._parameters):
            if f"{i}.step" in state:
                moments = {name: state[f"{i}.{name}"].to(parameter.device) for name in _MOMENTS}
                self._optimizer.state[parameter] = {"step": state[f"{i}.step"], **moments}
        self._drop_gradients()

    def _checked(self, batch: LossBatch) -> Loss:
        loss, trainer = loss_of(batch), self._trainer
        check_data(batch, loss, vocab_size(trainer.module), trainer.max_length)
        return loss

    def _parts(self, data: Sequence[Datum]) -> Iterator[list[Datum]]:
        """The data in passes of a bounded number of tokens."""
        part: list[Datum] = []
        count = 0
        for datum in data:
            if part and count + len(datum.tokens) > self._trainer.tokens_per_pass:
                yield part
                part, count = [], 0
            part.append(datum)
            count += len(datum.tokens)
        yield part

    def _pass(self, data: Sequence[Datum], loss: Loss, batch: LossBatch) -> tuple[Tensor, list[Tensor]]:
        """The summed loss of some data, and the log probabilities of their targets."""
        is_long = sum(len(datum.tokens) for datum in data) > self._trainer.tokens_per_pass
        attach = self._adapter.attach
        scorer = DifferentiableScorer(self._trainer.module, checkpoint_layers=is_long, attach=attach)
        inputs, targets = [datum.tokens for datum in data], [datum.inputs["target_tokens"] for datum in data]
        logprobs = scorer.target_logprobs(inputs, targets)
        return summed(loss, logprobs, data, batch.config), logprobs

    def _accumulate(self, gradients: Sequence[Tensor]) -> None:
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise RequestError("the gradients are not finite: lower the weights, the advantages or the learning rate")
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad()
        self._is_incomplete = False

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for i, parameter in enumerate(self._parameters):
            for name, value in self._optimizer.state.get(parameter, {}).items():
                yield f"{i}.{name}", value


def _result(results: Sequence[tuple[Tensor, list[Tensor]]]) -> LossResult:
    loss = sum(float(total) for total, _ in results)
    return LossResult(loss, [tensor.float().cpu().numpy() for _, part in results for tensor in part])

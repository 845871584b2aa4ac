"""The losses of `forward_backward` by name, sums over tokens, and the check of what they are given.

A loss is a function of the log probabilities of the targets; everything else is data. Called by `LoraModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from penstock.errors import RequestError, shown
from penstock.training.lora.records import Datum, LossBatch
from penstock.values import real

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]
_TARGETS = "target_tokens"


@dataclass(frozen=True, slots=True)
class Loss:
    """`function(logprobs, inputs, config)` gives the loss of each token; `inputs` are its names besides the targets.

    `defaults` are the settings that it knows. Those that stand in `optional` may be left out of a datum.
    """

    function: Callable[[Tensor, Inputs, Config], Tensor]
    inputs: tuple[str, ...]
    defaults: Config = field(default_factory=dict)
    optional: tuple[str, ...] = ()


def loss_of(batch: LossBatch) -> Loss:
    """The loss that a batch names. Raises `RequestError` for it, and for settings that it does not have."""
    if (loss := LOSSES.get(batch.loss_fn)) is None:
        raise RequestError(f"loss_fn {shown(batch.loss_fn)} is not known: use one of {', '.join(LOSSES)}")
    for name, value in batch.config.items():
        if name not in loss.defaults:
            names = ", ".join(loss.defaults) or "none"
            raise RequestError(f"the loss {batch.loss_fn} has no setting {shown(name)}: it has {names}")
        real(name, value, 0.0, 1e300, "a finite number >= 0")
    return loss


def check_data(batch: LossBatch, loss: Loss, vocab_size: int, max_length: int | None) -> None:
    """Raise `RequestError` for a datum with other lengths, names or values than its loss takes."""
    if not batch.data:
        raise RequestError("there is no data: pass at least one datum")
    for number, datum in enumerate(batch.data):
        try:
            _check_datum(datum, loss, vocab_size, max_length)
        except RequestError as error:
            raise RequestError(f"datum {number}: {error}") from None


def _check_datum(datum: Datum, loss: Loss, vocab_size: int, max_length: int | None) -> None:
    count = len(datum.tokens)
    if not count:
        raise RequestError("model_input has no tokens")
    if max_length is not None and count > max_length:
        raise RequestError(f"model_input has {count} tokens, and the model takes at most {max_length}")
    _check_names(datum, loss)
    targets = datum.inputs[_TARGETS]
    if targets.ndim not in (1, 2) or len(targets) != count or not targets.size:
        shape = list(targets.shape)
        raise RequestError(
            f"{_TARGETS} must be [{count}] or [{count}, K], as model_input has {count} tokens, not {shape}"
        )
    for name, ids in (("model_input", datum.tokens), (_TARGETS, targets)):
        if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= vocab_size:
            raise RequestError(f"{name} must hold token ids from 0 to {vocab_size - 1}")
    for name, values in datum.inputs.items():
        if name == _TARGETS:
            continue
        if values.shape != targets.shape:
            raise RequestError(
                f"{name} must have the shape of {_TARGETS}, {list(targets.shape)}, not {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            raise RequestError(f"{name} must hold finite numbers")


def _check_names(datum: Datum, loss: Loss) -> None:
    required = {_TARGETS, *loss.inputs}
    if missing := sorted(required - datum.inputs.keys()):
        raise RequestError(f"loss_fn_inputs lacks {', '.join(missing)}")
    if unknown := sorted(datum.inputs.keys() - required - {*loss.optional}):
        raise RequestError(f"loss_fn_inputs has {', '.join(unknown)}, which the loss does not take")


def summed(loss: Loss, logprobs: Sequence[Tensor], data: Sequence[Datum], config: Config) -> Tensor:
    """The loss of all tokens of `data`, a float32 scalar."""
    settings = {**loss.defaults, **config}
    total = logprobs[0].new_zeros(())
    for values, datum in zip(logprobs, data, strict=True):
        names = [name for name in datum.inputs if name != _TARGETS]
        inputs = {name: torch.tensor(datum.inputs[name], dtype=torch.float32, device=values.device) for name in names}
        total = total + loss.function(values, inputs, settings).sum()
    return total


def _cross_entropy(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    return -logprobs * inputs["weights"] if "weights" in inputs else -logprobs


def _importance_sampling(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    return -(logprobs - inputs["logprobs"]).exp() * inputs["advantages"]


def _ppo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """The smaller of the clipped and the unclipped objective (Schulman et al., 2017)."""
    ratio, advantages = (logprobs - inputs["logprobs"]).exp(), inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clipped(ratio, config) * advantages)


def _cispo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """REINFORCE with a clipped ratio as a constant weight (MiniMax, 2025)."""
    ratio = _clipped((logprobs - inputs["logprobs"]).exp(), config).detach()
    return -ratio * inputs["advantages"] * logprobs


def _dro(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """An off-policy objective with a quadratic penalty (Richemond et al., 2024)."""
    penalty = 0.5 * config["beta"] * (logprobs - inputs["logprobs"]).square()
    return -(logprobs * inputs["advantages"] - penalty)


def _clipped(ratio: Tensor, config: Config) -> Tensor:
    return ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


_RL_INPUTS = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy, (), optional=("weights",)),
    "importance_sampling": Loss(_importance_sampling, _RL_INPUTS),
    "ppo": Loss(_ppo, _RL_INPUTS, _CLIP),
    "cispo": Loss(_cispo, _RL_INPUTS, _CLIP),
    "dro": Loss(_dro, _RL_INPUTS, {"beta": 0.05}),
}

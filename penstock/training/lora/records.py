"""What goes into and comes out of training an adapter, and the protocol of a trainer. Imports no torch.

`LoraTrainer` implements the protocol; a server is written against it. Arrays are numpy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from penstock.errors import RequestError
from penstock.values import flag, integer, real

Array = Any  # a numpy array, which would take longer to import than everything else here
MAX_RANK = 512
LORA_ALPHA = 32.0  # the sum of an adapter is scaled by this over its rank
_LARGEST = 1e300


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Which layers an adapter changes, and its rank from 1 to `MAX_RANK`. Raises `RequestError`.

    `seed` initializes the matrices; None is another one every time. `train_attn` are the linear layers of attention,
    `train_mlp` those between them, `train_unembed` is the output head.
    """

    rank: int
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def __post_init__(self) -> None:
        integer("rank", self.rank, 1, MAX_RANK, f"an integer from 1 to {MAX_RANK}")
        if self.seed is not None:
            integer("seed", self.seed, -(2**63), 2**63 - 1, "None or an integer of 64 bits")
        flags = [flag(name, getattr(self, name)) for name in ("train_attn", "train_mlp", "train_unembed")]
        if not any(flags):
            raise RequestError("an adapter must change something: set train_attn, train_mlp or train_unembed")


@dataclass(frozen=True, slots=True)
class Adam:
    """One step of AdamW, with the meanings of `torch.optim.AdamW`. Raises `RequestError`.

    `grad_clip_norm` is the largest norm of all gradients together; 0 leaves them as they are. `eps` is at least 1e-30:
    near 0, a gradient of 0 would make a weight NaN, and at first all those of a are 0.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "grad_clip_norm"):
            real(name, getattr(self, name), 0.0, _LARGEST, "a finite number >= 0")
        real("eps", self.eps, 1e-30, _LARGEST, "a finite number >= 1e-30")
        for name in ("beta1", "beta2"):
            if real(name, value := getattr(self, name), 0.0, 1.0, "a number from 0 and below 1") == 1:
                raise RequestError(f"{name} must be below 1, got {value}")


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """A sequence of N tokens, int64 [N], and the inputs of its loss by name.

    `target_tokens`, int64 [N] or [N, K], are what each position is to predict; the other inputs are float32 of the same
    shape.
    """

    tokens: Array
    inputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True, eq=False)
class LossBatch:
    """Sequences, the name of the loss, and its settings."""

    data: Sequence[Datum]
    loss_fn: str
    config: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class LossResult:
    """The sum of the losses, and for each datum the log probabilities of its targets, float32 in their shape."""

    loss: float
    logprobs: Sequence[Array]


class TrainedAdapter(Protocol):
    """An adapter in training. Its methods compute where they are called, and never two at a time."""

    @property
    def shape(self) -> LoraShape:
        """Which layers it changes."""
        ...

    def forward(self, batch: LossBatch) -> LossResult:
        """The losses. Raises `RequestError`."""
        ...

    def forward_backward(self, batch: LossBatch) -> LossResult:
        """The losses, whose gradients are added to those since the last step. Raises `RequestError`.

        After an error the gradients are incomplete, and the next step is refused.
        """
        ...

    def mark_incomplete(self) -> None:
        """Refuse the next step, as after an error: a part of its data is missing."""
        ...

    def step(self, adam: Adam) -> float:
        """Change the weights; returns the norm of the gradients. Raises `RequestError`."""
        ...

    def save(self, folder: Path, *, optimizer: bool) -> None:
        """Write the adapter to an existing folder, as peft writes it."""
        ...

    def load(self, folder: Path, *, optimizer: bool) -> None:
        """Take the weights from a folder, and with `optimizer` its state too. Raises `WeightsError`."""
        ...


class AdapterTrainer(Protocol):
    """Trains adapters of one base module, any number of them."""

    def num_bytes(self, shape: LoraShape) -> int:
        """The bytes of such an adapter in training, with its gradients and the state of its optimizer."""
        ...

    def create(self, shape: LoraShape) -> TrainedAdapter:
        """A new adapter, which changes nothing yet. Raises `RequestError`."""
        ...

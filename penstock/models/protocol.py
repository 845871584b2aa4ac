"""What the engine needs of a model: `ModelSpec` (facts) and `ModelRunner` (verbs). Imports no torch.

The engine calls `execute` and `trim_memory` from one thread, `forget` and `memory_usage` from others; everything else
before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.step import StepPlan, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Facts about a loaded model. Sizes are bytes; `max_length` is tokens, prompt and output together.

    `max_length_reason` says why the model cannot do more, and what to change; "" where the settings say less.
    `kernels` says what its hot operations run with, `rewrites` what was replaced in it to be faster.
    `defaults` are the sampling parameters that the model's own generation config sets, and its `max_length` and
    `min_length`, in which the prompt counts.
    """

    name: str
    vocab_size: int
    max_length: int
    max_length_reason: str = ""
    eos_token_ids: frozenset[int] = frozenset()
    kv_bytes_per_token: int = 1
    weight_bytes: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    kernels: str = "none"
    rewrites: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


class ModelChanged(Exception):
    """The module was changed before or during a step, and now runs as what it has become.

    Of the step nothing counts, and no K/V computed until now may be read again.
    """


class ModelRunner(Protocol):
    """Runs step plans. Implemented by `Executor` for real models and by `ScriptedModel` for tests."""

    spec: ModelSpec

    def free_bytes(self) -> int:
        """Memory that a K/V cache could take now."""
        ...

    def host_free_bytes(self) -> int:
        """Ordinary memory that a tier on the host could take now."""
        ...

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        """Make room for the K/V of `num_blocks` blocks, and of as many on the host as told. Raises `OutOfMemory`."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; a fault of one row comes back in its `RowResult`, a fault of the step is raised.

        Raises `ModelChanged` where the step is to be planned again.
        """
        ...

    def forget(self, seq_id: int) -> None:
        """Drop what is remembered of a sequence that ended."""
        ...

    def memory_usage(self) -> float:
        """Fraction of the device's memory in use, 0 to 1."""
        ...

    def trim_memory(self, blocks: Sequence[int] = (), places: Sequence[int] = ()) -> int:
        """Give unused memory back, that of these blocks and places on the host included; how many bytes.

        Called between steps, on the thread that runs them; a block or place named here may be used by the next step.
        """
        ...

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        ...


class GuessingRunner(ModelRunner, Protocol):
    """A draft model. Implemented by `DraftRunner`."""

    def guess(self, plan: StepPlan) -> Sequence[tuple[int, float] | None]:
        """The most likely next token of each row that samples, and its probability; None for the others."""
        ...

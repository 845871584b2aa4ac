"""What the engine needs of a model: `ModelSpec` (facts) and `ModelRunner` (verbs). Imports no torch.

The engine calls `execute` from one thread at a time and `forget` from another; everything else before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.step import StepPlan, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Facts about a loaded model. Sizes are bytes; `max_length` is tokens, prompt and output together.

    `kernels` says what its hot operations run with, `rewrites` what was replaced in it to be faster.
    `defaults` are the sampling parameters that the model's own generation config recommends.
    """

    name: str
    vocab_size: int
    max_length: int
    eos_token_ids: frozenset[int] = frozenset()
    kv_bytes_per_token: int = 1
    weight_bytes: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    kernels: str = "none"
    rewrites: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


class ModelRunner(Protocol):
    """Runs step plans. Implemented by `Executor` for real models and by `ScriptedModel` for tests."""

    spec: ModelSpec

    def free_bytes(self) -> int:
        """Memory that a K/V cache could take now."""
        ...

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make room for the K/V of `num_blocks` blocks. Raises `OutOfMemory`."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; a fault of one row comes back in its `RowResult`, a fault of the step is raised."""
        ...

    def forget(self, seq_id: int) -> None:
        """Drop what is remembered of a sequence that ended."""
        ...

    def memory_usage(self) -> float:
        """Fraction of the device's memory in use, 0 to 1."""
        ...

    def trim_memory(self) -> None:
        """Give cached, unused memory back."""
        ...

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        ...

"""What the engine needs of a model: `ModelSpec` (facts) and `ModelRunner` (verbs). Imports no torch.

The engine calls `execute` and `trim_memory` from one thread, `forget` and `memory_usage` from others, and everything
else before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from penstock.api.weights import SleepLevel, WeightSource
from penstock.constraints.masks import Masks
from penstock.scores import DifferentiableScore, FloatArray
from penstock.step import StepPlan, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Facts about a loaded model. Sizes are bytes; `max_length` is tokens, prompt and output together.

    `max_length_reason` says why the model cannot do more, and what to change; "" where the settings limit it further.
    `hidden_size` is the length of an embedding; 0 where the model gives none.
    `kernels` describes the implementation of its hot operations, `rewrites` what was replaced in it for speed.
    `packed_bytes` are copies of weights; 0 where these are used where they are.
    `is_batch_invariant` promises that a row's results are the same bits whatever else a step computes.
    `checks_candidates`: greedy rows may come without a mask, and their constraints are asked for the first candidate
    that they allow. That is for models on the CPU, where masks take the time of the forward pass.
    `defaults` are the sampling parameters that the model's own generation config sets, and its `max_length` and
    `min_length`, which include the prompt.
    """

    name: str
    vocab_size: int
    max_length: int
    max_length_reason: str = ""
    eos_token_ids: frozenset[int] = frozenset()
    hidden_size: int = 0
    kv_bytes_per_token: int = 1
    weight_bytes: int = 0
    packed_bytes: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    kernels: str = "none"
    rewrites: tuple[str, ...] = ()
    is_batch_invariant: bool = False
    checks_candidates: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)  # values of any parameter

    @property
    def weight_mode(self) -> Literal["shared", "packed"]:
        """Whether kernels run on packed copies of the weights, or on the weights where they are."""
        return "packed" if self.packed_bytes else "shared"


class ModelChanged(Exception):
    """The borrowed module was changed before or during a step; the runner has switched to its new state.

    The step is void, and no K/V computed before may be read again.
    """


class ModelRunner(Protocol):
    """Runs step plans. Implemented by `Executor` for real models and by `ScriptedModel` for tests.

    `weight_version` is in every `StepResult`. It is raised by `update_weights`, and before `ModelChanged` is raised.
    """

    spec: ModelSpec
    weight_version: int

    def free_bytes(self) -> int:
        """Memory that a K/V cache could take now."""
        ...

    def host_free_bytes(self) -> int:
        """Host memory that the host tier could take now."""
        ...

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        """Allocate `num_blocks` K/V blocks, and `num_host_blocks` in the host tier. Raises `OutOfMemory`."""
        ...

    def execute(self, plan: StepPlan, masks: Masks | None = None) -> StepResult:
        """Run one step; an error of one row comes back in its `RowResult`, an error of the step is raised.

        `masks` come with a plan that samples under constraints, for all rows but those that `checks_candidates` leaves
        out. They are filled meanwhile: call `masks.wait()` after the forward pass. Raises `ModelChanged` where the step
        must be planned again.
        """
        ...

    def forget(self, seq_id: int) -> None:
        """Drop the state of a sequence that ended."""
        ...

    def memory_usage(self) -> float:
        """Fraction of the device's memory in use, 0 to 1."""
        ...

    def trim_memory(self, blocks: Sequence[int] = (), places: Sequence[int] = ()) -> int:
        """Give unused memory back, that of these blocks and host places included; returns the number of bytes.

        Called between steps, on the thread that runs them; the next step may use the blocks and places again.
        """
        ...

    def read_weights(self, source: WeightSource) -> WeightSource:
        """Check the weights of a source, without writing any; returns what to pass to `update_weights`.

        None stands for weights that their owner changes. Raises `WeightsError`.
        """
        ...

    def update_weights(self, source: WeightSource) -> None:
        """Write the weights of a source that was read, refresh what is derived from them, raise `weight_version`.

        Called between steps, on the thread that runs them. Raises `WeightsError`, which says whether old and new
        weights are mixed.
        """
        ...

    def check_unload(self, level: SleepLevel) -> None:
        """Raise `WeightsError` where `unload` would lose weights."""
        ...

    def unload(self, level: SleepLevel) -> None:
        """Free the K/V storage until `allocate`, and weights until `reload`."""
        ...

    def reload(self) -> None:
        """Make or read released weights again. Raises `WeightsError`, `OutOfMemory`; then it can be repeated."""
        ...

    def close(self) -> None:
        """Free the cache and let go of the weights."""
        ...


class GradientScorer(Protocol):
    """Scores pairs of prompt and completion, as token ids, with gradients. Implemented by `DifferentiableScorer`."""

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        values: Sequence[FloatArray] | None = None,
    ) -> list[DifferentiableScore]:
        """A score for every pair. With `values`, float32, the log probabilities have these values. Any thread."""
        ...


@runtime_checkable
class DifferentiableRunner(Protocol):
    """A runner of a model that can be trained. Implemented by `Executor`."""

    def gradient_scorer(self, *, checkpoint_layers: bool, dropout: bool = True) -> GradientScorer:
        """Scores under the gradient and autocast modes of the calling thread. Raises `ConfigurationError`.

        Without `dropout`, the module computes as in eval mode, whatever mode it is in.
        """
        ...


class AdapterRead(NamedTuple):
    """An adapter that was read: `load` applies it under a key. To be called on the thread of the steps, between them.

    Without `may_fail` nobody has to wait for it. Otherwise it may raise `WeightsError`, and has changed nothing then.
    """

    load: Callable[[str], None]
    may_fail: bool


class AdapterStore(Protocol):
    """The adapters of a runner, by keys. Implemented by `PackedAdapters` and `TorchAdapters`."""

    def read(self, source: object, name: str) -> AdapterRead:
        """Read an adapter from a folder or a live module, where it may be called `name`, without applying it.

        Any thread. Raises `WeightsError`.
        """
        ...

    def unload(self, key: str) -> None:
        """Drop an adapter that no later step uses; unknown keys are ignored. Called where steps run, between them."""
        ...


@runtime_checkable
class AdapterRunner(Protocol):
    """A runner that applies to each row the adapter that the row names. Implemented by `Executor`."""

    @property
    def adapters(self) -> AdapterStore:
        """The adapters that it holds."""
        ...


class GuessingRunner(ModelRunner, Protocol):
    """A draft model. Implemented by `DraftRunner`."""

    def guess(self, plan: StepPlan) -> Sequence[tuple[int, float] | None]:
        """The most likely next token of each row that samples, and its probability; None for the others."""
        ...

"""`Pooler`: turns the final hidden states of a step into embeddings.

Owns the sums of prompts whose prefill takes several steps. Hidden states are taken where the model's decoder returns
them, after its last norm, so no logits are computed for an embedding. Called by the executor.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from penstock.errors import ExecutionError, described
from penstock.pooling import PoolingParams
from penstock.step import Row, RowResult


class HiddenStates:
    """Inside its block, the final hidden states of the last forward pass of `module` as `states`, [T, H]."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.states: Tensor | None = None
        self.reason = "its decoder returns no last_hidden_state"  # why there are no states

    def __enter__(self) -> HiddenStates:
        try:
            self._handle = self._module.get_decoder().register_forward_hook(self._take)  # type: ignore[operator]
        except Exception as error:  # the class is the caller's
            self._handle = None
            self.reason = f"its decoder is unknown ({described(error)})"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _take(self, module: nn.Module, args: object, output: object) -> None:
        states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if isinstance(states, Tensor) and states.ndim == 3:
            self.states = states[0]


class Pooler:
    """Adds the embeddings to the results of a step's rows.

    A mean is summed in float64, so it does not depend on the steps among which a prompt is divided.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def pooled(self, rows: Sequence[Row], results: Sequence[RowResult], hidden: HiddenStates) -> tuple[RowResult, ...]:
        """The results, with those of rows that pool. One without finite hidden states gets an `ExecutionError`."""
        states, num_tokens = hidden.states, sum(row.num_tokens for row in rows)
        if states is None or len(states) != num_tokens:
            error = ExecutionError(f"this model gives no embeddings: {hidden.reason}")
            return tuple(_with_error(row, result, error) for row, result in zip(rows, results, strict=True))
        pooled, begin = list[RowResult](), 0
        for row, result in zip(rows, results, strict=True):
            end = begin + row.num_tokens
            pooled.append(self._pool(row, states[begin:end]) if isinstance(row.params, PoolingParams) else result)
            begin = end
        return tuple(pooled)

    def forget(self, seq_id: int) -> None:
        """Drop the sum of a sequence that ended."""
        self._sums.pop(seq_id, None)

    def _pool(self, row: Row, states: Tensor) -> RowResult:
        assert isinstance(row.params, PoolingParams)
        is_complete = row.end == row.prompt_len
        if row.params.pooling == "last":
            return _result(states[-1]) if is_complete else RowResult()
        total = states.sum(0, dtype=torch.float64)
        if row.start:  # else a sum from before a preemption is void
            total += self._sums[row.seq_id]
        if is_complete:
            self.forget(row.seq_id)
            return _result(total / row.prompt_len)
        self._sums[row.seq_id] = total
        return RowResult()


def _result(vector: Tensor) -> RowResult:
    vector = vector.to("cpu", torch.float32)
    if not bool(vector.isfinite().all()):
        return RowResult(error=ExecutionError("the model's hidden states are not finite: check its weights and dtype"))
    return RowResult(pooled=array("f", vector.numpy().tobytes()))


def _with_error(row: Row, result: RowResult, error: ExecutionError) -> RowResult:
    return RowResult(error=error) if isinstance(row.params, PoolingParams) else result

"""Questions about the distribution at each position of a prompt: log probabilities of given ids, and alternatives.

Scores the prompt piece by piece with its logits, whose number at once is bounded; each piece finds the earlier ones in
the prefix cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tinker.proto import tinker_public_pb2 as pb

from penstock.errors import RequestError
from penstock.serving.tinker.requests import TensorFields
from penstock.serving.tinker.service import AdapterEngine
from penstock.serving.tinker.wire import dense, sparse_message, tensor_message
from penstock.training.lora.records import Array

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
PIECE = 64  # positions whose logits exist at once
NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class Positions:
    """The prompt of a request, and what its distributions depend on besides. Rows begin with that of token 1."""

    engine: AdapterEngine
    ids: list[int]
    namespace: str
    adapter: str

    async def logprobs(self, first_row: int = 0) -> AsyncIterator[tuple[int, FloatArray]]:
        """Log probabilities [rows, vocab] of every token at places 1, 2, ..., in pieces, each with its first row."""
        for begin in range(first_row + 1, len(self.ids), PIECE):
            piece = self.ids[begin : begin + PIECE]
            (score,) = await self.engine.score(
                [self.ids[:begin]], [piece], logits=True, namespace=self.namespace, adapter=self.adapter
            )
            yield begin - 1, await asyncio.to_thread(_log_softmax, score.logits)


async def target_logprobs(positions: Positions, fields: TensorFields) -> pb.Tensor:
    """The log probabilities of the ids that a tensor names, in its layout; 0 where it names none."""
    targets = _matrix(fields, len(positions.ids) - 1)
    places_with_target = np.flatnonzero((targets != NO_TARGET).any(axis=1))
    values = np.zeros(targets.shape, dtype=np.float32)
    async for row, logprobs in positions.logprobs(int(places_with_target[0])):
        part = targets[row : row + len(logprobs)]
        if part.max() >= logprobs.shape[1]:
            raise RequestError(f"target_prompt_logprobs must hold token ids below {logprobs.shape[1]}, or -1")
        chosen = np.take_along_axis(logprobs, np.maximum(part, 0), axis=1)
        values[row : row + len(part)] = np.where(part == NO_TARGET, 0.0, chosen)
    crow, columns = fields.sparse_crow_indices, fields.sparse_col_indices
    if crow is None or columns is None:
        return tensor_message(values)
    rows = np.repeat(np.arange(len(values)), np.diff(crow))
    return sparse_message(values[rows, columns], values.shape, crow, columns)


def _matrix(fields: TensorFields, rows: int) -> IntArray:
    """The ids [rows, K]. Raises `RequestError`."""
    if rows < 1:
        raise RequestError(
            "target_prompt_logprobs needs a prompt of at least two tokens: none is predicted in this one"
        )
    shape, data = fields.shape or [], _integers(fields.data)
    matrix: IntArray
    if len(shape) != 2 or shape[0] != rows or shape[1] < 1:
        raise RequestError(f"target_prompt_logprobs must be [{rows}, K], one row less than the prompt has tokens")
    if fields.sparse_crow_indices is not None and fields.sparse_col_indices is not None:
        csr = fields.sparse_crow_indices, fields.sparse_col_indices
        crow, columns = map(_integers, csr)
        matrix = dense(data, shape, crow, columns, pad=NO_TARGET)
    elif data.size == shape[0] * shape[1]:
        matrix = data.reshape(shape)
    else:
        raise RequestError(f"target_prompt_logprobs has {data.size} ids, and the shape {shape}")
    if matrix.min() < NO_TARGET or matrix.max() == NO_TARGET:
        raise RequestError("target_prompt_logprobs must hold token ids, at least one, and -1 elsewhere")
    return matrix


def _integers(values: Sequence[float]) -> IntArray:
    array = np.asarray(values, dtype=None if values else np.int64)
    if array.dtype != np.int64:
        raise RequestError("target_prompt_logprobs must hold integers of 64 bits")
    return array


async def alternatives(positions: Positions, k: int, temperature: float, seed: int | None) -> pb.PromptAltTokens:
    """k tokens drawn at every position, independently, and the log probabilities that the model gives them."""
    generator = np.random.default_rng(None if seed is None else abs(seed))
    tokens, values = [np.zeros((0, k), dtype=np.int64)], [np.zeros((0, k), dtype=np.float32)]
    async for _, logprobs in positions.logprobs():
        alternatives_here = await asyncio.to_thread(_drawn, logprobs, k, temperature, generator)
        tokens.append(alternatives_here)
        values.append(np.take_along_axis(logprobs, alternatives_here, axis=1))
    columns = np.concatenate(tokens), np.concatenate(values)
    return pb.PromptAltTokens(tokens=tensor_message(columns[0]), logprobs=tensor_message(columns[1]))


def _drawn(logprobs: FloatArray, k: int, temperature: float, generator: np.random.Generator) -> IntArray:
    """[rows, k] tokens; the most likely one at temperature 0."""
    if temperature == 0:
        return np.repeat(logprobs.argmax(axis=1)[:, None], k, axis=1)
    with np.errstate(over="ignore"):  # at a temperature near 0, where all but the most likely tokens get -inf
        scaled = (logprobs - logprobs.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    cumulative = np.exp(scaled).cumsum(axis=1)
    points = generator.random((len(logprobs), k)) * cumulative[:, -1:]
    rows = zip(cumulative, points, strict=True)
    return np.stack([np.searchsorted(row, point, side="right") for row, point in rows]).astype(np.int64)


def _log_softmax(logits: Array) -> FloatArray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result

"""Protobuf messages of the Tinker SDK to records and back. The messages come with the package `tinker`.

Checks sizes before anything is built of them. Imported by the endpoints, once the service is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from penstock.errors import RequestError
from penstock.serving.tinker.requests import MAX_ID
from penstock.training.lora.records import Array, Datum, LossBatch, LossResult

MAX_ELEMENTS = 1 << 24  # of one tensor; a sparse one is small in a message
MAX_SPARSE_ELEMENTS = 1 << 26  # of all sparse ones of a message
MASKED = -99999.0  # the log probability of an empty place among the most likely tokens
_DTYPES: dict[int, npt.DTypeLike] = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64, pb.DTYPE_INT32: np.int32}
_STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}


class LossRequest:
    """`/forward_backward`: which model, and what to compute. Raises `RequestError` for any other message."""

    def __init__(self, body: bytes) -> None:
        self._message = pb.ForwardBackwardRequest()
        try:
            self._message.ParseFromString(body)
        except DecodeError:
            raise RequestError("the body is no ForwardBackwardRequest of the Tinker SDK") from None
        self.model_id = self._message.model_id[:MAX_ID]
        self.seq_id = self._message.seq_id
        self.is_forward_only = self._message.forward_only

    def batch(self) -> LossBatch:
        """What to compute. Raises `RequestError`."""
        message = self._message
        _check_sparse(tensor for datum in message.data for tensor in datum.loss_fn_inputs.values())
        config = dict(message.loss_fn_config)
        for name, value in message.loss_fn_config_v2.items():
            if value.WhichOneof("value") != "number":
                raise RequestError(f"the setting {name!r} of the loss must be a number")
            config[name] = value.number
        return LossBatch([_datum(number, datum) for number, datum in enumerate(message.data)], message.loss_fn, config)


def _datum(number: int, message: pb.Datum) -> Datum:
    try:
        inputs = {name: array_of(tensor) for name, tensor in message.loss_fn_inputs.items()}
        return Datum(_tokens(message.model_input), inputs)
    except RequestError as error:
        raise RequestError(f"datum {number}: {error}") from None


def _check_sparse(tensors: Iterable[pb.Tensor]) -> None:
    """Refuse sparse tensors that together are much larger than their message."""
    shapes = [tensor.shape for tensor in tensors if tensor.WhichOneof("encoding") == "sparse_csr"]
    if (count := sum(math.prod(max(0, size) for size in shape) for shape in shapes)) > MAX_SPARSE_ELEMENTS:
        raise RequestError(
            f"the sparse tensors have {count} elements: {MAX_SPARSE_ELEMENTS} are allowed, send fewer data"
        )


def _tokens(chunks: Iterable[pb.Chunk]) -> Array:
    parts = [np.empty(0, dtype=np.int64)]
    for chunk in chunks:
        if (kind := chunk.WhichOneof("chunk")) != "encoded_text":
            raise RequestError(f"model_input has a chunk of the type {kind}: this model takes tokens alone")
        parts.append(_buffer(chunk.encoded_text.tokens, np.int32).astype(np.int64))
    return np.concatenate(parts)


def array_of(message: pb.Tensor) -> Array:
    """A tensor as an array, float32 or int64. Raises `RequestError`."""
    shape = tuple(message.shape)
    if any(size < 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise RequestError(f"a tensor has the shape {list(shape)}: it may have up to {MAX_ELEMENTS} elements")
    encoding = message.WhichOneof("encoding")
    if encoding == "sparse_csr":
        csr = message.sparse_csr
        crow, columns = (_buffer(data, np.int64) for data in (csr.crow_indices, csr.col_indices))
        return dense(_values(csr.values, message.dtype), shape, crow, columns)
    values = _values(message.dense, message.dtype)
    if not message.shape:
        return values
    if values.size != math.prod(shape):
        raise RequestError(f"a tensor has {values.size} elements, and the shape {list(shape)}")
    return values.reshape(shape)


def _values(data: bytes, dtype: int) -> Array:
    if dtype == pb.DTYPE_BFLOAT16:
        return (_buffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype not in _DTYPES:
        raise RequestError("a tensor has an unknown dtype")
    values = _buffer(data, _DTYPES[dtype])
    return values.astype(np.int64) if dtype == pb.DTYPE_INT32 else values


def _buffer(data: bytes, dtype: npt.DTypeLike) -> Array:
    if len(data) % np.dtype(dtype).itemsize:
        raise RequestError("a tensor's bytes are not a whole number of elements")
    return np.frombuffer(data, dtype=dtype)


def dense(values: Array, shape: Sequence[int], crow: Array, columns: Array, pad: int = 0) -> Array:
    """The matrix of a sparse tensor (CSR). Raises `RequestError` for indices that do not belong together."""
    counts = np.diff(crow)
    fits = (
        len(shape) == 2
        and math.prod(shape) <= MAX_ELEMENTS
        and len(crow) == shape[0] + 1
        and len(values) == len(columns) == crow[-1]
        and crow[0] == 0
        and bool((counts >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not fits:
        raise RequestError("the indices of a sparse tensor do not fit its shape and values")
    matrix = np.full(shape, pad, dtype=values.dtype)
    matrix[np.repeat(np.arange(shape[0]), counts), columns] = values
    return matrix


def loss_message(result: LossResult) -> bytes:
    """The losses, as the SDK reads them: records of data whose arrays have the same trailing shape."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": result.loss})
    for trailing, group in groupby(result.logprobs, key=lambda array: array.shape[1:]):
        arrays = [np.ascontiguousarray(array, dtype=np.float32) for array in group]
        offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64)
        record = message.loss_fn_outputs.add(num_datums=len(arrays))
        record.fields["logprobs"].CopyFrom(
            pb.BatchedTensor(
                data=b"".join(array.tobytes() for array in arrays),
                offsets=offsets.tobytes(),
                dtype=pb.DTYPE_FLOAT32,
                trailing_shape=trailing,
            )
        )
    return bytes(message.SerializeToString())


def sequence_message(
    tokens: Sequence[int], logprobs: Sequence[float], stop_reason: str, top: pb.TopkLogprobs | None
) -> pb.SampledSequence:
    """One sample."""
    return pb.SampledSequence(
        stop_reason=_STOP_REASONS[stop_reason],
        tokens=np.asarray(tokens, dtype=np.int32).tobytes(),
        logprobs=np.asarray(logprobs, dtype=np.float32).tobytes(),
        topk_sampled_logprobs=top,
    )


def top_message(rows: Sequence[Sequence[tuple[int, float]]], k: int) -> pb.TopkLogprobs:
    """The k most likely tokens of every position with their log probabilities; an empty row is a position without."""
    ids = np.zeros((len(rows), k), dtype=np.int32)
    logprobs = np.full((len(rows), k), MASKED, dtype=np.float32)
    for i, row in enumerate(rows):
        for j, (token, logprob) in enumerate(row[:k]):
            ids[i, j], logprobs[i, j] = token, logprob
    return pb.TopkLogprobs(token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=k, length=len(rows))


def tensor_message(array: Array) -> pb.Tensor:
    """An array, float32 or int64."""
    dtype = pb.DTYPE_FLOAT32 if array.dtype == np.float32 else pb.DTYPE_INT64
    return pb.Tensor(dense=np.ascontiguousarray(array).tobytes(), dtype=dtype, shape=array.shape)


def sparse_message(values: Array, shape: Sequence[int], crow: Sequence[int], columns: Sequence[int]) -> pb.Tensor:
    """A sparse float32 matrix."""
    csr = pb.SparseCsr(
        values=values.tobytes(),
        crow_indices=np.asarray(crow, dtype=np.int64).tobytes(),
        col_indices=np.asarray(columns, dtype=np.int64).tobytes(),
    )
    return pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_FLOAT32, shape=shape)

"""Linear layers with packed weights, and norms, over the compiled kernels: `Linear` and `Norm`.

Owns the packed copies of weights, which `write` fills again in place, in part or in whole; every other tensor is the
caller's. Used by the rewrites of `optimizers`. The layout of packed weights is documented in `cpu/linear.c`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.low_rank import AdapterSlots
from penstock.kernels.native import (
    FLOATS,
    TYPES,
    Kernels,
    address,
    check,
    floats,
    operand,
    pages,
    strided,
    write_floats,
)
from penstock.kernels.structures import LinearStruct, NormStruct, PackingStruct

ACTIVATIONS = ("identity", "silu", "gelu_tanh", "gelu", "relu")
STORE, ADD, GATED = 0, 1, 2
NO_NORM, RMS, LAYER = 0, 1, 2

_RANK = 16  # directions of a calibration: RANK in cpu/packing.c
_OVERSAMPLING, _ITERATIONS = 8, 2
_DAMPING = 0.1  # share of the energy that is never taken for known: a few inputs say little about others
_KEPT = 1  # in place of a row's address: the column stays as it is packed (KEPT in cpu/packing.c)
_COPIED_BYTES = 1 << 20  # of a matrix whose rows are not contiguous, at once


class Norm:
    """RMSNorm or LayerNorm over rows of `weight.shape[0]` numbers, computed in float32; `scale` is for `add_to`."""

    def __init__(
        self, kernels: Kernels, kind: int, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        self.kind, self.eps, self.k, self.width = kind, eps, len(weight), len(weight)
        self.weight, self.bias = floats(weight), None if bias is None else floats(bias)
        if bias is not None and len(bias) != self.width:
            raise AssertionError(f"a norm of {self.width} numbers has a bias of {len(bias)}")
        self._kernels, self._dtype = kernels, dtype
        self._struct = NormStruct(len(weight), kind, TYPES[dtype], eps, scale, address(self.weight), address(self.bias))
        self.pointer = ctypes.addressof(self._struct)

    def write(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Replace weight and bias [N], of any dtype, in place; None keeps what is there."""
        write_floats((self.weight, weight), (self.bias, bias))

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The norm of x [M, N]; into `out` if given."""
        out = torch.empty_like(x) if out is None else out
        self._run(x, out, 0)
        return out

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """out += scale * norm(x), both [M, N], in place."""
        self._run(x, out, 1)

    def _run(self, x: Tensor, out: Tensor, add: int) -> None:
        k, rows = self._kernels, x.shape[0]
        source, target = (operand(y, self._dtype, rows, self.width) for y in (x, out))
        check(k.library.ps_norm(k.pool, self.pointer, source, rows, target, add))


@dataclass(frozen=True, slots=True)
class Calibration:
    """The inputs of a layer: `directions` [16, K] float32 hold most of their energy, `residual` is the rest / K.

    A direction d of length l stands for a mean square of l^2 along d / l.
    """

    directions: Tensor
    residual: float

    @classmethod
    def of(cls, inputs: Tensor) -> Calibration:
        """From inputs [T, K], by subspace iteration (Halko et al. 2011, arXiv 0909.4061)."""
        x = inputs.detach().float()
        start = torch.Generator().manual_seed(0)
        basis = torch.randn(x.shape[1], _RANK + _OVERSAMPLING, generator=start, dtype=torch.float32, device="cpu")
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(x.T @ (x @ basis)).Q
        _, sizes, rows = torch.linalg.svd(x @ basis, full_matrices=False)
        directions = torch.zeros(_RANK, x.shape[1], dtype=torch.float32, device="cpu")
        leading = (sizes[:, None] * rows @ basis.T)[:_RANK] / len(x) ** 0.5
        directions[: len(leading)] = leading
        energy = x.square().sum().item() / len(x)
        residual = max(energy - directions.square().sum().item(), _DAMPING * energy)
        return cls(directions, residual / x.shape[1])


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What follows a product in the same kernel.

    `mode` STORE writes y = activation(product), ADD adds scale * y to the output, GATED takes two matrices of one size
    and writes activation(first product) * second product. `dtype` of the output; None: as the weights.
    """

    mode: int = STORE
    activation: str = "identity"
    scale: float = 1.0
    dtype: torch.dtype | None = None


STORE_ONLY = Epilogue()


class Linear:
    """epilogue(norm(x) W^T + b) with packed weights W [N, K], the rows of several matrices one below the other.

    `quantize` packs int8 weights with a scale per output and quantizes each row of x; with a `calibration`, weights are
    rounded so that their errors cancel for inputs like those it has seen.
    """

    def __init__(
        self,
        kernels: Kernels,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        norm: Norm | None = None,
        quantize: bool = False,
        calibration: Calibration | None = None,
        epilogue: Epilogue = STORE_ONLY,
    ) -> None:
        dtype, mode = weights[0].dtype, epilogue.mode
        self.n, self.k = sum(len(w) for w in weights), weights[0].shape[1]
        self.width = self.n // 2 if mode == GATED else self.n
        self._in_dtype, self.dtype = dtype, epilogue.dtype or dtype
        self._kernels, self._norm, self._calibration = kernels, norm, calibration if quantize else None
        self._sizes, self._mode = [len(w) for w in weights], mode
        if norm is not None and norm.width != self.k:
            raise AssertionError(f"a norm of {norm.width} numbers cannot be applied to {self.k}")
        if any(w.dtype != dtype for w in weights):
            raise AssertionError(f"a kernel was given matrices of several dtypes, {[w.dtype for w in weights]}")
        self._format = TYPES[torch.int8 if quantize else dtype]
        self._weights, self._scales, self._lows = self._allocated()
        self.num_bytes = self._weights.numel()
        self._bias = self._column_floats() if any(bias is not None for bias in biases) else None
        self.write(weights, biases)
        self._struct = LinearStruct(
            n=self.n, k=self.k, format=self._format, mode=mode, act=ACTIVATIONS.index(epilogue.activation),
            in_type=TYPES[dtype], out_type=TYPES[self.dtype], norm_kind=norm.kind if norm else NO_NORM,
            scale=epilogue.scale, eps=norm.eps if norm else 0.0, weights=address(self._weights),
            bias=address(self._bias), scales=address(self._scales), lows=address(self._lows),
            norm_weight=address(norm.weight if norm else None), norm_bias=address(norm.bias if norm else None),
        )  # fmt: skip
        self.pointer, self.adapters = ctypes.addressof(self._struct), AdapterSlots(kernels, self._struct)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Apply to x [M, K], rows contiguous: `out` [M, N], made if not given."""
        k, rows = self._kernels, x.shape[0]
        if out is None:
            out = x.new_empty(rows, self.width, dtype=self.dtype)
        source, target = strided(x, self._in_dtype, rows, self.k), strided(out, self.dtype, rows, self.width)
        slots = self.adapters.of_rows(rows)
        check(k.library.ps_linear(k.pool, self.pointer, source, rows, x.stride(0), target, out.stride(0), slots))
        return out

    @property
    def memory(self) -> Tensor:
        """The memory of the packed matrices, uint8."""
        return self._weights

    def write(self, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> None:
        """Pack these matrices [N, K] and biases [N], of any floating dtype, over the earlier ones; None keeps those.

        Needs no memory in the size of a matrix.
        """
        self._check_shapes(weights, biases)
        firsts = self.firsts()
        for dtype in {w.dtype for w in weights if w is not None}:
            self._write_rows(
                [(i, w) for i, w in zip(firsts, weights, strict=True) if w is not None and w.dtype == dtype]
            )
        for first, bias in zip(firsts, biases, strict=True):
            if bias is not None:
                self._write_bias(first, bias)

    def firsts(self) -> list[int]:
        """The outputs at which its matrices begin."""
        return [0, *accumulate(self._sizes[:-1])]

    def _check_shapes(self, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> None:
        for size, weight, bias in zip(self._sizes, weights, biases, strict=True):
            if weight is not None and weight.shape != (size, self.k):
                raise AssertionError(
                    f"a kernel was given a matrix {tuple(weight.shape)} where it takes ({size}, {self.k})"
                )
            if bias is not None and bias.shape != (size,):
                raise AssertionError(f"a bias {tuple(bias.shape)} does not fit {size} outputs")

    def _write_bias(self, first: int, bias: Tensor) -> None:
        """Write the bias of the outputs from `first` on."""
        if self._bias is None:
            raise AssertionError("a product without a bias was given one")
        order = torch.from_numpy(self._order())
        columns = ((order >= first) & (order < first + len(bias))).nonzero()[:, 0]
        self._bias[columns] = bias.detach().float()[order[columns] - first]

    def _order(self) -> np.ndarray:
        """The output of each packed column; -1 for padding. GATED panels alternate `lanes` gates and `lanes` ups."""
        columns = self._kernels.columns(self.n)
        order = np.arange(columns)
        if self._mode == GATED:
            lanes, half = self._kernels.lanes, self.n // 2
            panel, lane = order // (2 * lanes), order % (2 * lanes)
            output = panel * lanes + lane % lanes
            return np.where(output < half, output + (lane >= lanes) * half, -1)
        return np.where(order < self.n, order, -1)

    def _allocated(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Zeroed memory for packed weights, and for the scale and minimum of each int8 column."""
        columns, per_word = self._kernels.columns(self.n), {1: 2, 3: 4}.get(self._format, 1)
        weights = pages(columns * -(-self.k // per_word) * (2 if self._format == 2 else 4))
        if self._format != TYPES[torch.int8]:
            return weights, None, None
        return weights, self._column_floats(), self._column_floats()

    def _column_floats(self) -> Tensor:
        return torch.zeros(self._kernels.columns(self.n), dtype=torch.float32, device="cpu")

    def _write_rows(self, matrices: Sequence[tuple[int, Tensor]]) -> None:
        """Pack matrices of one dtype at the outputs where they begin; all other columns stay as they are."""
        contiguous = [(first, w) for first, w in matrices if w.stride(-1) == 1 or self.k == 1]
        if contiguous:
            self._pack(contiguous)
        for first, w in matrices:
            if not (w.stride(-1) == 1 or self.k == 1):
                rows = max(1, _COPIED_BYTES // (self.k * w.element_size()))
                for begin in range(0, len(w), rows):
                    self._pack([(first + begin, w[begin : begin + rows].contiguous())])

    def _pack(self, matrices: Sequence[tuple[int, Tensor]]) -> None:
        dtype = matrices[0][1].dtype
        addresses = np.full(self.n + 1, _KEPT, dtype=np.int64)  # by output, and the last for padding
        addresses[-1] = 0
        for first, w in matrices:
            start = strided(w, dtype, len(w), self.k)
            addresses[first : first + len(w)] = np.arange(len(w)) * (w.stride(0) * w.element_size()) + start
        rows = addresses[self._order()]
        feedback = (None, None) if self._calibration is None else self._feedback(self._calibration)
        packing = PackingStruct(
            rows.ctypes.data, len(rows), self.k, FLOATS[dtype], self._format, address(self._weights),
            address(self._scales), address(self._lows), *map(address, feedback),
        )  # fmt: skip
        check(self._kernels.library.ps_pack(self._kernels.pool, ctypes.byref(packing)))

    def _feedback(self, calibration: Calibration) -> tuple[Tensor, Tensor]:
        """The rotated directions [K, 16], and the same with each row divided by its energy."""
        rotated = calibration.directions.clone()
        self._kernels.library.ps_rotate(operand(rotated, torch.float32, _RANK, self.k), _RANK, self.k)
        directions = rotated.T.contiguous()
        energy = directions.square().sum(1, keepdim=True) + calibration.residual
        return directions, directions / energy.clamp(min=1e-30)

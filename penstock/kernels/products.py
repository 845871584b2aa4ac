"""Linear layers with packed weights, and norms, over the compiled kernels: `Linear` and `Norm`.

Owns the packed copies of weights; every other tensor is the caller's. Used by the rewrites of `optimizers`. The
layout of packed weights is documented in `cpu/linear.c`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.native import TYPES, Kernels, address, check, floats, operand, pages, strided
from penstock.kernels.structures import LinearStruct, NormStruct, PackingStruct

ACTIVATIONS = ("identity", "silu", "gelu_tanh", "gelu", "relu")
STORE, ADD, GATED = 0, 1, 2
NO_NORM, RMS, LAYER = 0, 1, 2

_RANK = 16  # directions of a calibration: RANK in cpu/packing.c
_OVERSAMPLING, _ITERATIONS = 8, 2
_DAMPING = 0.1  # share of the energy that is never taken for known: a few inputs say little about others


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
        self.num_bytes = 0
        self._kernels = kernels
        self._norm = norm
        if norm is not None and norm.width != self.k:
            raise AssertionError(f"a norm of {norm.width} numbers is no norm of {self.k}")
        rows = self._packed_rows(weights, mode)
        self._bias = self._packed_biases(biases, weights, mode)
        format = TYPES[torch.int8 if quantize else dtype]
        self._pack(rows, dtype, format, calibration)
        self._struct = LinearStruct(
            n=self.n, k=self.k, format=format, mode=mode, act=ACTIVATIONS.index(epilogue.activation),
            in_type=TYPES[dtype], out_type=TYPES[self.dtype], norm_kind=norm.kind if norm else NO_NORM,
            scale=epilogue.scale, eps=norm.eps if norm else 0.0, weights=address(self._weights),
            bias=address(self._bias), scales=address(self._scales), lows=address(self._lows),
            norm_weight=address(norm.weight if norm else None), norm_bias=address(norm.bias if norm else None),
        )  # fmt: skip
        self.pointer = ctypes.addressof(self._struct)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Apply to x [M, K], rows contiguous: `out` [M, N], made if not given."""
        k, rows = self._kernels, x.shape[0]
        if out is None:
            out = x.new_empty(rows, self.width, dtype=self.dtype)
        source, target = strided(x, self._in_dtype, rows, self.k), strided(out, self.dtype, rows, self.width)
        check(k.library.ps_linear(k.pool, self.pointer, source, rows, x.stride(0), target, out.stride(0)))
        return out

    def _order(self, mode: int) -> np.ndarray:
        """The output of each packed column; -1 for padding. GATED panels alternate `lanes` gates and `lanes` ups."""
        columns = self._kernels.columns(self.n)
        order = np.arange(columns)
        if mode == GATED:
            lanes, half = self._kernels.lanes, self.n // 2
            panel, lane = order // (2 * lanes), order % (2 * lanes)
            output = panel * lanes + lane % lanes
            return np.where(output < half, output + (lane >= lanes) * half, -1)
        return np.where(order < self.n, order, -1)

    def _packed_rows(self, weights: Sequence[Tensor], mode: int) -> np.ndarray:
        """The address of the row of weights of each packed column; 0 for padding."""
        starts = [strided(w, self._in_dtype, len(w), self.k) for w in weights]
        rows = [
            np.arange(len(w)) * (w.stride(0) * w.element_size()) + start
            for w, start in zip(weights, starts, strict=True)
        ]
        order = self._order(mode)
        return np.where(order >= 0, np.concatenate(rows).astype(np.int64)[order], 0)

    def _packed_biases(self, biases: Sequence[Tensor | None], weights: Sequence[Tensor], mode: int) -> Tensor | None:
        if all(bias is None for bias in biases):
            return None
        flat = torch.cat([_bias_of(w, bias) for w, bias in zip(weights, biases, strict=True)])
        order = torch.from_numpy(self._order(mode))
        return torch.where(order >= 0, flat[order], 0.0).contiguous()

    def _pack(self, rows: np.ndarray, dtype: torch.dtype, format: int, calibration: Calibration | None) -> None:
        columns, per_word = len(rows), {1: 2, 3: 4}.get(format, 1)
        self._weights = pages(columns * -(-self.k // per_word) * (2 if format == 2 else 4))
        quantized = format == TYPES[torch.int8]
        self._scales = torch.zeros(columns, dtype=torch.float32, device="cpu") if quantized else None
        self._lows = torch.zeros(columns, dtype=torch.float32, device="cpu") if quantized else None
        feedback = self._feedback(calibration) if quantized and calibration is not None else (None, None)
        self.num_bytes = self._weights.numel()
        packing = PackingStruct(
            rows.ctypes.data, columns, self.k, TYPES[dtype], format, address(self._weights), address(self._scales),
            address(self._lows), *map(address, feedback),
        )  # fmt: skip
        check(self._kernels.library.ps_pack(self._kernels.pool, ctypes.byref(packing)))

    def _feedback(self, calibration: Calibration) -> tuple[Tensor, Tensor]:
        """The rotated directions [K, 16], and the same with each row divided by its energy."""
        rotated = calibration.directions.clone()
        self._kernels.library.ps_rotate(operand(rotated, torch.float32, _RANK, self.k), _RANK, self.k)
        directions = rotated.T.contiguous()
        energy = directions.square().sum(1, keepdim=True) + calibration.residual
        return directions, directions / energy.clamp(min=1e-30)


def _bias_of(weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [N]; zeros if there is no bias."""
    if bias is None:
        return torch.zeros(len(weight), dtype=torch.float32, device="cpu")
    if bias.shape != weight.shape[:1]:
        raise AssertionError(f"a bias {tuple(bias.shape)} does not fit {len(weight)} outputs")
    return bias.detach().float()

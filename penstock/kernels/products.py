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

    `quantize` packs int8 weights with a scale per output and quantizes each row of x.
    """

    def __init__(
        self,
        kernels: Kernels,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        norm: Norm | None = None,
        quantize: bool = False,
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
        self._pack(rows, dtype, format)
        self._struct = LinearStruct(
            n=self.n, k=self.k, format=format, mode=mode, act=ACTIVATIONS.index(epilogue.activation),
            in_type=TYPES[dtype], out_type=TYPES[self.dtype], norm_kind=norm.kind if norm else NO_NORM,
            scale=epilogue.scale, eps=norm.eps if norm else 0.0, weights=address(self._weights),
            bias=address(self._bias), scales=address(self._scales), offsets=address(self._offsets),
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

    def _pack(self, rows: np.ndarray, dtype: torch.dtype, format: int) -> None:
        columns, per_word = len(rows), {1: 2, 3: 4}.get(format, 1)
        self._weights = pages(columns * -(-self.k // per_word) * (2 if format == 2 else 4))
        quantized = format == TYPES[torch.int8]
        self._scales = torch.zeros(columns, dtype=torch.float32, device="cpu") if quantized else None
        self._offsets = torch.zeros(columns, dtype=torch.int32, device="cpu") if quantized else None
        self.num_bytes = self._weights.numel()
        packing = PackingStruct(
            rows.ctypes.data, columns, self.k, TYPES[dtype], format, address(self._weights), address(self._scales),
            address(self._offsets),
        )  # fmt: skip
        self._kernels.library.ps_pack(self._kernels.pool, ctypes.byref(packing))


def _bias_of(weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [N]; zeros if there is no bias."""
    if bias is None:
        return torch.zeros(len(weight), dtype=torch.float32, device="cpu")
    if bias.shape != weight.shape[:1]:
        raise AssertionError(f"a bias {tuple(bias.shape)} does not fit {len(weight)} outputs")
    return bias.detach().float()

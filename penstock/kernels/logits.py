"""`LogitKernels`: what the sampler needs of logits, each in one pass over memory, on the kernels' threads. CPU only.

Owns nothing: results are new tensors. Logits are float32 [R, N * block]; a mask is int32 [W] with a bit per token, and
tokens beyond its words are refused. A row of a result depends on its own logits and mask alone, to the bit. Called by
the sampler.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.kernels.native import Kernels, address, check, operand
from penstock.kernels.structures import (
    AllowedArgmaxStruct,
    GreatestLogitsStruct,
    LogitSummaryStruct,
    MaskedCopyStruct,
    TokenDrawStruct,
)

_PIECE = 8192  # logits that one thread takes at a time


class LogitSummary(NamedTuple):
    """Of logits [R, N * block]: `block_maxima` [R, N] and `maxima` [R], float32; `tokens`, the argmax, int64 [R].

    `totals` is the sum of exp(logit - maximum), float64 [R]. A row with a NaN has a maximum and a total of NaN.
    """

    block_maxima: Tensor
    maxima: Tensor
    totals: Tensor
    tokens: Tensor


class Distributions(NamedTuple):
    """What M tokens are drawn from: `rows` int64 [M] of the logits, and all that shapes them.

    A token weighs exp((logit - peak) / temperature), or nothing if that is below the floor or its mask refuses it.
    `peaks`, `temperatures` (>= the smallest normal number) and `floors` are float32 [M], `masks` int32 [M, W].
    """

    rows: Tensor
    peaks: Tensor
    temperatures: Tensor
    floors: Tensor
    masks: Tensor | None = None


class Drawn(NamedTuple):
    """Tokens int64 [M], their weights float32 [M], and the sums of all weights of their distributions, float64 [M]."""

    tokens: Tensor
    weights: Tensor
    totals: Tensor


class LogitKernels:
    """Every method raises `AssertionError` for a tensor that does not fit, `MemoryError` without memory for scratch.

    `block` is a multiple of 32 that divides 8192.
    """

    def __init__(self, kernels: Kernels, block: int) -> None:
        if block % 32 or _PIECE % block:
            raise AssertionError(f"a kernel cannot take blocks of {block} logits")
        self._kernels = kernels
        self.block = block

    def summarize(self, logits: Tensor) -> LogitSummary:
        """Maxima and sums of exponentials of whole rows."""
        source, (rows, width) = self._source(logits), logits.shape
        summary = LogitSummary(
            logits.new_empty(rows, width // self.block),
            logits.new_empty(rows),
            logits.new_empty(rows, dtype=torch.float64),
            logits.new_empty(rows, dtype=torch.int64),
        )
        call = LogitSummaryStruct(source, rows, width, self.block, *map(address, summary))
        check(self._kernels.library.ps_summarize_logits(self._kernels.pool, ctypes.byref(call)))
        return summary

    def argmax_allowed(
        self, logits: Tensor, block_maxima: Tensor, rows: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The greatest logit that each mask [M, W] allows in its row, float32 [M] (-inf for none), and its token [M].

        block_maxima float32 [R, N] of all logits, rows int64 [M].
        """
        source, width, count = self._source(logits), logits.shape[1], len(rows)
        tops = operand(block_maxima, torch.float32, len(logits), width // self.block)
        places, bits = _places(rows, logits), operand(masks, torch.int32, count, masks.shape[-1])
        maxima, tokens = logits.new_empty(count), logits.new_empty(count, dtype=torch.int64)
        sizes = count, width, self.block, masks.shape[-1]
        call = AllowedArgmaxStruct(source, tops, places, bits, *sizes, address(maxima), address(tokens))
        check(self._kernels.library.ps_allowed_argmax(self._kernels.pool, ctypes.byref(call)))
        return maxima, tokens

    def greatest(
        self, logits: Tensor, block_maxima: Tensor, rows: Tensor, count: int, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The `count` greatest logits of rows int64 [M] that their masks [M, W] allow, [M, count], and their tokens.

        float32, descending; of equal logits the first tokens, int64. Behind the last that is allowed, -inf and token 0.
        A NaN is left out. block_maxima float32 [R, N] of all logits.
        """
        source, width, num_rows = self._source(logits), logits.shape[1], len(rows)
        if not 0 < count <= width:
            raise AssertionError(f"a kernel cannot find {count} of {width} logits")
        tops = operand(block_maxima, torch.float32, len(logits), width // self.block)
        num_words = 0 if masks is None else masks.shape[-1]
        bits = None if masks is None else operand(masks, torch.int32, num_rows, num_words)
        values, tokens = logits.new_empty(num_rows, count), logits.new_empty(num_rows, count, dtype=torch.int64)
        sizes = num_rows, width, self.block, num_words, count
        places = _places(rows, logits)
        call = GreatestLogitsStruct(source, tops, places, bits, *sizes, address(values), address(tokens))
        check(self._kernels.library.ps_greatest_logits(self._kernels.pool, ctypes.byref(call)))
        return values, tokens

    def masked(self, logits: Tensor, rows: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of `rows` int64 [M], -inf where their masks [M, W] refuse a token, and its blocks' maxima [M, N]."""
        source, width, count = self._source(logits), logits.shape[1], len(rows)
        places, bits = _places(rows, logits), operand(masks, torch.int32, count, masks.shape[-1])
        copy, block_maxima = logits.new_empty(count, width), logits.new_empty(count, width // self.block)
        sizes = count, width, self.block, masks.shape[-1]
        call = MaskedCopyStruct(source, places, bits, *sizes, address(copy), address(block_maxima))
        check(self._kernels.library.ps_masked_copy(self._kernels.pool, ctypes.byref(call)))
        return copy, block_maxima

    def draw(self, logits: Tensor, distributions: Distributions, uniforms: Tensor) -> Drawn:
        """Draw in vocabulary order by `uniforms`, float64 [M] in [0, 1). Where no token has a weight, any is named."""
        tokens = torch.empty(len(uniforms), dtype=torch.int64, device="cpu")
        return self._weigh(logits, distributions, tokens, operand(uniforms, torch.float64, len(tokens)))

    def weigh(self, logits: Tensor, distributions: Distributions, tokens: Tensor) -> Drawn:
        """The same weights and totals as `draw` has, for the given `tokens`, int64 [M]."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < logits.shape[1]:
            raise AssertionError(f"the tokens are {tokens.tolist()}, and there are {logits.shape[1]}")
        return self._weigh(logits, distributions, tokens, None)

    def _weigh(self, logits: Tensor, of: Distributions, tokens: Tensor, uniforms: int | None) -> Drawn:
        source, width, count = self._source(logits), logits.shape[1], len(tokens)
        bits = None if of.masks is None else operand(of.masks, torch.int32, count, of.masks.shape[-1])
        rates = 1 / of.temperatures
        shapes = [operand(x, torch.float32, count) for x in (of.peaks, rates, of.floors)]
        drawn = Drawn(tokens, logits.new_empty(count), logits.new_empty(count, dtype=torch.float64))
        call = TokenDrawStruct(
            source, _places(of.rows, logits), bits, *shapes, uniforms,
            count, width, self.block, 0 if of.masks is None else of.masks.shape[-1],
            address(drawn.totals), operand(tokens, torch.int64, count), address(drawn.weights),
        )  # fmt: skip
        check(self._kernels.library.ps_draw(self._kernels.pool, ctypes.byref(call)))
        return drawn

    def _source(self, logits: Tensor) -> int:
        """The address of logits."""
        rows, width = logits.shape
        if width % self.block:
            raise AssertionError(f"rows of {width} logits are not blocks of {self.block}")
        return operand(logits, torch.float32, rows, width)


def _places(rows: Tensor, logits: Tensor) -> int:
    """The address of the numbers of rows, int64 [M]."""
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(logits):
        raise AssertionError(f"rows {rows.tolist()} are requested, and there are {len(logits)}")
    return operand(rows, torch.int64, len(rows))

"""`Vocabulary`: rows of float32 logits divided into chunks, so that most questions need no full pass.

Owns the layout in chunks and the arithmetic that must give the same bits whatever the batch: maxima, sums, ranks, the
greatest logits in order. Knows nothing of requests; never writes into its logits. Called by the samplers.

A sum is float32 within a chunk and float64 across chunks: exact to 1e-7 relative, however large the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.logits import Distributions, LogitKernels

CHUNK = 64
_LOG2_E = 1.4426950408889634
_LOW_WORD = 0xFFFFFFFF
_MARGIN = 8  # candidates beyond those requested, so that ties at the edge are complete

Top = tuple[tuple[int, float, int], ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """Unnormalised probabilities: values float32 [R, N, CHUNK], and the running sum of chunks float64 [R, N]."""

    values: Tensor
    cumulative: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Weights:
        """Sum up `values` float32 [R, N, CHUNK]."""
        return cls(values, values.sum(-1).cumsum(-1, dtype=torch.float64))

    @property
    def total(self) -> Tensor:
        """The row's sum, float64 [R]."""
        return self.cumulative[:, -1]

    def take(self, rows: Tensor) -> Weights:
        """The same for some rows, copied."""
        return Weights(self.values[rows], self.cumulative[rows])


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Logits float32 [R, N, CHUNK], padded with -inf; each chunk's greatest [R, N] and each row's [R].

    `size` is the number of logits per row without padding. A row with a NaN has a NaN for its peak. Where `kernels`
    summarized the logits, `total` is the sum of exp(logit - peak), float64 [R], and `first_peak` the first index of the
    greatest logit, int64 [R]. Where `masks`, int32 [R, W] with a bit per token, refuse a token, the logit is -inf.
    """

    chunks: Tensor
    chunk_peaks: Tensor
    peak: Tensor
    size: int
    total: Tensor | None = None
    first_peak: Tensor | None = None
    masks: Tensor | None = None
    kernels: LogitKernels | None = None

    @classmethod
    def of(cls, logits: Tensor, kernels: LogitKernels | None = None) -> Vocabulary:
        """Divide logits [R, V] of any float dtype into chunks; copies only where conversion or padding needs it.

        With `kernels`, whose blocks are chunks, on the CPU; plain torch without them.
        """
        size = logits.shape[1]
        padding = -size % CHUNK
        if padding or logits.dtype != torch.float32 or not logits.is_contiguous():
            padded = torch.empty(len(logits), size + padding, dtype=torch.float32, device=logits.device)
            padded[:, :size] = logits
            padded[:, size:] = -torch.inf
            logits = padded
        chunks = logits.view(len(logits), -1, CHUNK)
        if kernels is None:
            chunk_peaks = chunks.amax(-1)
            return cls(chunks, chunk_peaks, chunk_peaks.amax(-1), size)
        summary = kernels.summarize(logits)
        peaks = summary.block_maxima, summary.maxima
        return cls(chunks, *peaks, size, summary.totals, summary.tokens, kernels=kernels)

    @property
    def flat(self) -> Tensor:
        """The logits and their padding, float32 [R, N * CHUNK]."""
        return self.chunks.flatten(1)

    def take(self, rows: Tensor) -> Vocabulary:
        """A copy of some rows."""
        total, first_peak, masks = (None if x is None else x[rows] for x in (self.total, self.first_peak, self.masks))
        copies = self.chunks[rows], self.chunk_peaks[rows], self.peak[rows]
        return Vocabulary(*copies, self.size, total, first_peak, masks, self.kernels)

    def refreshed(self, masks: Tensor | None = None) -> Vocabulary:
        """The same logits with their peaks computed again, after `flat` was written to, by `masks` at last."""
        chunk_peaks = self.chunks.amax(-1)
        peak = chunk_peaks.amax(-1)
        return Vocabulary(self.chunks, chunk_peaks, peak, self.size, masks=masks, kernels=self.kernels)

    def at(self, tokens: Tensor) -> Tensor:
        """The logits [R] of one token per row; tokens int64 [R]."""
        return self.flat.gather(1, tokens[:, None])[:, 0]

    def argmax(self) -> Tensor:
        """The first of the greatest logits, int64 [R]."""
        if self.first_peak is not None:
            return self.first_peak
        chunk = self.chunk_peaks.argmax(-1)
        row = torch.arange(len(chunk), dtype=torch.int64, device=chunk.device)
        offset = self.chunks[row, chunk].argmax(-1)
        return chunk * CHUNK + offset

    def weights(self, temperature: Tensor | None = None) -> Weights:
        """exp((logit - peak) / temperature [R]), so that the greatest weighs 1."""
        shifted = self.chunks - self.peak[:, None, None]
        if temperature is not None:
            shifted /= temperature[:, None, None].to(shifted.dtype)
        if self.masks is not None:  # PyTorch's exp is many times slower for -inf
            return Weights.of(shifted.mul_(_LOG2_E).exp2_())
        return Weights.of(shifted.exp_())

    def weight_total(self, temperature: Tensor) -> Tensor:
        """The total of `weights(temperature)`, float64 [R]."""
        if self.kernels is None:
            return self.weights(temperature).total
        rows = torch.arange(len(self.peak), dtype=torch.int64, device="cpu")
        floors = torch.zeros_like(self.peak)
        distributions = Distributions(rows, self.peak, temperature.to(torch.float32), floors, self.masks)
        return self.kernels.weigh(self.flat, distributions, torch.zeros_like(rows)).totals

    def log_total(self, weights: Weights | None = None) -> Tensor:
        """The log of the sum of exp(logit), float64 [R]: what log_softmax subtracts; given `weights()` save work."""
        total = self.total
        if total is None:
            total = (self.weights() if weights is None else weights).total
        return self.peak.double() + total.log()

    def entropy(self) -> Tensor:
        """The entropy of the distribution that softmax makes of each row, in nats, float64 [R]."""
        weights = self.weights()
        terms: Tensor = torch.special.entr(weights.values).sum(-1).sum(-1, dtype=torch.float64)
        return weights.total.log() + terms / weights.total

    def num_above(self, logits: Tensor) -> Tensor:
        """How many of the row's logits are strictly greater than `logits` [R], int64 [R]."""
        above = torch.empty_like(self.chunks)
        torch.gt(self.chunks, logits[:, None, None], out=above)
        return above.sum(-1).long().sum(-1)

    def candidates(self, count: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The `count` greatest logits [R, count] and their tokens, in no order; ties at the edge fall anywhere.

        Of all rows, or of `rows` int64 [R].
        """
        num_chunks = self.chunks.shape[1]
        if count * 2 > num_chunks:
            flat = self.flat[:, : self.size]
            top = (flat if rows is None else flat[rows]).topk(count)
            return top.values, top.indices
        # The greatest `count` logits lie in the `count` chunks with the greatest peaks.
        chunk = (self.chunk_peaks if rows is None else self.chunk_peaks[rows]).topk(count, sorted=False).indices
        if rows is None:
            rows = torch.arange(len(chunk), dtype=torch.int64, device=chunk.device)
        top = self.chunks[rows[:, None], chunk].flatten(1).topk(count, sorted=False)
        return top.values, chunk.gather(1, top.indices // CHUNK) * CHUNK + top.indices % CHUNK

    def greatest(self, count: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The `count` greatest logits [R, count], descending, and their tokens; of equal logits the first tokens.

        Of all rows, or of `rows` int64 [R].
        """
        if self.kernels is not None and count * 2 <= self.chunks.shape[1]:
            places = torch.arange(len(self.peak), dtype=torch.int64, device="cpu") if rows is None else rows
            return self.kernels.greatest(self.flat, self.chunk_peaks, places, count)
        width = min(self.size, count + _MARGIN)
        while True:
            logits, tokens = in_order(*self.candidates(width, rows))
            if width == self.size or bool((logits[:, -1] < logits[:, max(count - 1, 0)]).all()):
                return logits[:, :count], tokens[:, :count]
            width = self.size

    def tops(self, log_total: Tensor, counts: list[int]) -> list[Top]:
        """Per row its `counts[i]` most likely tokens (-1: all) as (token, logprob, rank), best first.

        log_total float64 [R], see `log_total()`. Equal logits share a rank.
        """
        counts = [self.size if count < 0 else min(count, self.size) for count in counts]
        if not any(counts):
            return [()] * len(counts)
        logits, tokens = self.greatest(max(counts))
        ranks = torch.searchsorted(-logits, -logits) + 1
        logprobs = logits.double() - log_total[:, None]
        columns = zip(tokens.tolist(), logprobs.tolist(), ranks.tolist(), counts, strict=True)
        return [tuple(zip(t[:n], p[:n], r[:n], strict=True)) for t, p, r, n in columns]


def in_order(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sort candidates, float32 and int64 [R, W], by descending logit, then by ascending token.

    One sort of 64-bit keys: the logit's bits, made to rise with its value, above the token's, falling.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    order = ((rising << 32) | (_LOW_WORD - tokens)).argsort(-1, descending=True)
    return logits.gather(1, order), tokens.gather(1, order)

"""Grammars and logits: minus infinity for every token that may not follow, or the greatest logit of those that may.

Functions of tensors, vectorised over rows. Called by the sampler after every other rule, so that no rule and no
processor brings back a token that the grammar refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.constraints.masks import Masks
from penstock.errors import RequestError
from penstock.models.vocabulary import Vocabulary
from penstock.step import Row

_BYTE = 8
NUM_CANDIDATES = 16  # that a constraint is asked for before its mask is filled


def mask_errors(rows: Sequence[Row], masks: Masks) -> dict[int, RequestError]:
    """The errors of constraints that failed, by row."""
    constrained = [i for i, row in enumerate(rows) if row.constraint is not None]
    return {i: error for i in constrained if (error := masks.error(rows[i])) is not None}


def mask_rows(rows: Sequence[Row], masks: Masks) -> Tensor:
    """The mask of each row, int32 [R, W] on the CPU; not copied where they lie one after the other."""
    all_bits = torch.frombuffer(masks.bits, dtype=torch.int32).view(-1, masks.num_words)
    indices = [masks.index(row) for row in rows]
    if indices == list(range(indices[0], indices[0] + len(rows))):
        return all_bits[indices[0] : indices[0] + len(rows)]
    return all_bits[torch.tensor(indices, dtype=torch.int64, device="cpu")]


def greatest_allowed(
    raw: Vocabulary, places: Sequence[int], rows: Sequence[Row], masks: Masks | None
) -> tuple[Tensor, Tensor, dict[int, RequestError]]:
    """The greatest logit that may follow in each row, float32 [R] (-inf for none), and the first token that has it.

    `places[i]` is the place of `rows[i]` in `raw`. Also returns the errors of constraints by row. A row that was left
    out of the masks takes its first allowed candidate, which is what its mask would give; one without such a candidate
    gets a mask now. A row whose logits are not finite keeps its peak, and fails by it. For logits with kernels.
    """
    assert raw.kernels is not None
    index = torch.tensor(places, dtype=torch.int64, device="cpu")
    peaks, tokens = raw.peak[index], raw.argmax()[index]
    constrained = [i for i, row in enumerate(rows) if row.constraint is not None]
    masked = [i for i in constrained if masks is not None and masks.has(rows[i])]
    is_finite = peaks.isfinite().tolist()
    unmasked = [i for i in constrained if is_finite[i] and (masks is None or not masks.has(rows[i]))]
    late = _choose_candidates(raw, index, rows, unmasked, peaks, tokens)
    late_masks = Masks.of_rows([rows[i] for i in late]) if late else None
    if late_masks is not None:
        late_masks.fill()
        late_masks.wait()
    errors: dict[int, RequestError] = {}
    for members, filled in ((masked, masks), (late, late_masks)):
        if members and filled is not None:
            bits = mask_rows([rows[i] for i in members], filled)
            allowed = raw.kernels.argmax_allowed(raw.flat, raw.chunk_peaks, index[members], bits)
            peaks[members], tokens[members] = allowed
            errors |= {i: error for i in members if (error := filled.error(rows[i])) is not None}
    return peaks, tokens, errors


def _choose_candidates(
    raw: Vocabulary, index: Tensor, rows: Sequence[Row], members: Sequence[int], peaks: Tensor, tokens: Tensor
) -> list[int]:
    """Write the first allowed candidates of the rows `members`; returns the rows of whose candidates none is allowed.

    `index[i]` is the place of `rows[i]` in `raw`; `peaks` and `tokens` hold the greatest logit of each.
    """
    first = tokens.tolist()
    refused = [i for i in members if _first_allowed(rows[i], first[i : i + 1]) is None]
    if not refused:
        return []
    logits, candidates = (x.tolist() for x in raw.greatest(NUM_CANDIDATES, index[refused]))
    late: list[int] = []
    for i, row_logits, row_tokens in zip(refused, logits, candidates, strict=True):
        possible = [token for token, logit in zip(row_tokens, row_logits, strict=True) if logit > -torch.inf]
        token = _first_allowed(rows[i], possible[1:])
        if token is None:
            late.append(i)
        else:
            peaks[i], tokens[i] = row_logits[row_tokens.index(token)], token
    return late


def _first_allowed(row: Row, candidates: Sequence[int]) -> int | None:
    assert row.constraint is not None
    return row.constraint.first_allowed(candidates)


def masked_copy(logits: Vocabulary, rows: Tensor, bits: Tensor) -> Vocabulary:
    """A copy of the logits of `rows` int64 [R], -inf where their masks `bits` int32 [R, W] refuse a token.

    A row with a NaN keeps a NaN for its peak.
    """
    if logits.kernels is None:
        copy = logits.take(rows)
        rule_out(copy.flat, bits)
        return copy.refreshed(bits)
    flat, chunk_peaks = logits.kernels.masked(logits.flat, rows, bits)
    unmasked_peaks = logits.peak[rows]
    peak = torch.where(unmasked_peaks.isnan(), unmasked_peaks, chunk_peaks.amax(-1))
    chunks = flat.view(len(rows), *logits.chunks.shape[1:])
    return Vocabulary(chunks, chunk_peaks, peak, logits.size, masks=bits, kernels=logits.kernels)


def rule_out(logits: Tensor, bits: Tensor) -> None:
    """Rule out what masks `bits` int32 [R, W] on the CPU refuse, in `logits` float32 [R, V], in place."""
    penalties = F.embedding(bits.view(torch.uint8).int(), _penalties_by_byte()).flatten(1)
    width = min(logits.shape[1], penalties.shape[1])
    logits[:, :width] += penalties[:, :width].to(logits.device)
    logits[:, width:] = -torch.inf


def _penalties_by_byte() -> Tensor:
    """For each value of a byte, 0 or -inf for each of its 8 tokens: float32 [256, 8]."""
    values = torch.arange(256, dtype=torch.int64, device="cpu")[:, None]
    places = torch.arange(_BYTE, dtype=torch.int64, device="cpu")
    return torch.zeros(256, _BYTE, dtype=torch.float32, device="cpu").masked_fill_(
        (values >> places) & 1 == 0, -torch.inf
    )

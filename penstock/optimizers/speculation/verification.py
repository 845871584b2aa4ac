"""Verification of drafts: which of a step's draws count, as pure array functions over rows with ragged drafts.

Owns the rule that makes speculation lossless. Never draws and never sees a logit. Called by the executor around its
sampler.

After every draft position the sampler draws a token from the model's own distribution, with the uniform number that
belongs to that position whether or not there is a draft. Draft tokens that equal the draw are accepted; the first draw
that differs, or the one after a fully accepted draft, is added to them. This is the rejection sampling of [1] for
deterministic proposals (q puts 1 on one token): a draft token is accepted with the probability p that the model gives
it, and a rejected one is replaced by a draw from the rest of p. Because both outcomes use the position's own uniform
number, every token, not only its distribution, is what it would have been without a draft, for any parameters. A draft
model that samples its tokens, accepted with probability min(1, p/q), would be right a little more often, but the tokens
would change with every change of its drafts; docs/log.md has what that costs.
[1] Leviathan et al. 2023, https://arxiv.org/abs/2211.17192.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.step import Row, RowResult

_NO_TOKEN = -1


def positions(row: Row) -> list[Row]:
    """The row once per position after which a token is drawn, with only the drafts before it: 1 + len(draft)."""
    if not row.draft:
        return [row]
    length, draft = len(row.tokens), row.draft
    return [row._replace(end=length + i, draft=draft[:i]) for i in range(len(draft) + 1)]


def num_accepted(drafts: np.ndarray, lengths: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """How many draft tokens of each of R rows are right before the first wrong one.

    drafts int64 [D], of all rows one after the other; lengths int64 [R], how many each row has; draws int64 [D + R],
    the token drawn at each draft position of a row and after its last. Returns int64 [R].
    """
    starts = np.concatenate(([0], np.cumsum(lengths + 1)[:-1]))
    ends = starts + lengths
    proposed = np.full(len(draws), _NO_TOKEN, dtype=np.int64)
    is_draft = np.ones(len(draws), dtype=bool)
    is_draft[ends] = False
    proposed[is_draft] = drafts
    places = np.arange(len(draws))
    wrong_places = np.where(is_draft & (proposed == draws), len(draws), places)
    counts: np.ndarray = np.minimum.reduceat(wrong_places, starts) - starts
    return counts


def verified(rows: Sequence[Row], draws: Sequence[RowResult]) -> list[RowResult]:
    """Each row's result from those of its `positions`: the accepted draft tokens and one token more.

    A position that failed counts only if every draft token before it was right. If there are any, the result is those
    tokens: the next step begins with the position and fails as it would have without a draft.
    """
    drafts = np.array([token for row in rows for token in row.draft], dtype=np.int64)
    lengths = np.array([len(row.draft) for row in rows], dtype=np.int64)
    tokens = np.array([draw.tokens[0] if draw.tokens else _NO_TOKEN for draw in draws], dtype=np.int64)
    results, start = [], 0
    for length, count in zip(lengths.tolist(), num_accepted(drafts, lengths, tokens).tolist(), strict=True):
        results.append(_joined(draws[start : start + count + 1]))
        start += length + 1
    return results


def _joined(results: Sequence[RowResult]) -> RowResult:
    if len(results) == 1:
        return results[0]
    return RowResult(
        tokens=tuple(token for result in results for token in result.tokens),
        logprobs=tuple(entry for result in results for entry in result.logprobs),
    )

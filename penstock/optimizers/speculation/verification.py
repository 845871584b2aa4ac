"""Verification of drafts: which of a step's draws count, as pure array functions over rows with ragged drafts.

Owns the rule that makes speculation lossless. Never draws, never sees a logit. Called by the executor around its
sampler.

The sampler draws a token from the model's own distribution after every draft position, with the uniform that belongs
to that position whether anybody speculates or not; the drafts that equal what was drawn count, and with them the first
draw that differs, or the one behind a draft that was right throughout. This is the rejection sampling of [1] with
proposals that are certain (q puts 1 on one token): a guess is accepted with the probability p that the model gives it,
and a rejected one is replaced by a draw from the rest of p. Tying both outcomes to the position's own uniform makes
every token, not only its distribution, what it would have been without a draft, for any parameters. A draft model that
draws its guesses at random, kept with probability min(1, p/q), would be right a little more often, and would change
the tokens with every change of its guesses; docs/log.md has what that costs.
[1] Leviathan et al. 2023, https://arxiv.org/abs/2211.17192.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.step import Row, RowResult

_NOTHING = -1  # no token


def positions(row: Row) -> list[Row]:
    """The row once per position after which a token is drawn, with only the drafts before it: 1 + len(draft)."""
    if not row.draft:
        return [row]
    length, draft = len(row.tokens), row.draft
    return [row._replace(end=length + i, draft=draft[:i]) for i in range(len(draft) + 1)]


def num_accepted(drafts: np.ndarray, lengths: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """How many drafts of each of R rows are right before the first wrong one.

    drafts int64 [D], of all rows one after the other; lengths int64 [R], how many are each row's; drawn int64 [D + R],
    what was drawn in place of each row's drafts and after the last. Returns int64 [R].
    """
    begins = np.concatenate(([0], np.cumsum(lengths + 1)[:-1]))
    ends = begins + lengths
    proposed = np.full(len(drawn), _NOTHING, dtype=np.int64)
    is_draft = np.ones(len(drawn), dtype=bool)
    is_draft[ends] = False
    proposed[is_draft] = drafts
    place = np.arange(len(drawn))
    wrong = np.where(is_draft & (proposed == drawn), len(drawn), place)
    found: np.ndarray = np.minimum.reduceat(wrong, begins) - begins
    return found


def verified(rows: Sequence[Row], drawn: Sequence[RowResult]) -> list[RowResult]:
    """Each row's result from those of its `positions`: the accepted drafts and one token more.

    A position that failed counts only if every draft before it was right. Where others come before it, these are the
    result: the next step begins with the position, and fails as it would have without drafts.
    """
    drafts = np.array([token for row in rows for token in row.draft], dtype=np.int64)
    lengths = np.array([len(row.draft) for row in rows], dtype=np.int64)
    tokens = np.array([found.tokens[0] if found.tokens else _NOTHING for found in drawn], dtype=np.int64)
    results, begin = [], 0
    for length, accepted in zip(lengths.tolist(), num_accepted(drafts, lengths, tokens).tolist(), strict=True):
        results.append(_joined(drawn[begin : begin + accepted + 1]))
        begin += length + 1
    return results


def _joined(run: Sequence[RowResult]) -> RowResult:
    if len(run) == 1:
        return run[0]
    return RowResult(
        tokens=tuple(token for found in run for token in found.tokens),
        logprobs=tuple(entry for found in run for entry in found.logprobs),
    )

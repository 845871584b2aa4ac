"""`EventBuilder`: the events of sequences, with what earlier events have reported already.

Owns which prefix hit and which prompt logprobs were reported. Never changes a sequence. Called by `StepPlanner` when a
sequence starts, and by `Scheduler` and `Searches` when a step is committed.
"""

from __future__ import annotations

from collections.abc import Iterable

from penstock.sequence import FinishReason, Sequence
from penstock.step import Event, Row, RowResult, TokenLogprobs


class EventBuilder:
    """Keeps state of a sequence only from its start to its terminal event."""

    def __init__(self) -> None:
        self._num_cached: dict[int, int] = {}  # prefix hit of the first start, until it is reported
        # Prompt tokens whose logprobs were reported: a preempted sequence computes them again.
        self._num_scored: dict[int, int] = {}

    def note_start(self, seq: Sequence) -> None:
        """A sequence runs for the first time: its first event will report its prefix hit."""
        self._num_cached[seq.id] = seq.computed

    def of_row(
        self, row: Row, out: RowResult, count: int, reason: FinishReason | None, stop: int | None, version: int
    ) -> Event | None:
        """The event of a row of which `count` tokens were accepted; None if there is nothing to report."""
        scores = self._unreported(row, out.prompt_logprobs) if out.prompt_logprobs else ()
        if not count and not scores and out.scores is None and reason is None:
            return None
        if reason is not None:
            self._num_scored.pop(row.seq_id, None)
        num_cached = self._num_cached.pop(row.seq_id, 0)
        tokens, logprobs = out.tokens[:count], out.logprobs[:count]
        fixed = (row.seq_id, tokens, logprobs, scores, reason, stop, None, num_cached, version)
        event = Event(*fixed, pooled=out.pooled, scores=out.scores)
        if not row.draft:
            return event
        return event._replace(num_drafted_tokens=len(row.draft), num_accepted_tokens=min(count, out.num_accepted))

    def of_hypothesis(
        self,
        seq: Sequence,
        entries: tuple[TokenLogprobs, ...],
        reason: FinishReason,
        stop: int | None,
        versions: tuple[int, ...],
    ) -> Event:
        """The only event of a beam: all its tokens at the end of its search, with the version of each."""
        tokens = tuple(entry.token for entry in entries)
        self._num_scored.pop(seq.id, None)
        num_cached = self._num_cached.pop(seq.id, 0)
        return Event(seq.id, tokens, entries, (), reason, stop, None, num_cached, weight_versions=versions)

    def forget_scores(self, seq_ids: Iterable[int]) -> None:
        """The weights were changed: the prompt logprobs of these are reported again from the first one."""
        for seq_id in seq_ids:
            self._num_scored.pop(seq_id, None)

    def of_end(self, seq: Sequence, reason: FinishReason, error: Exception | None) -> Event:
        """The terminal event of a sequence that ends without a token."""
        self._num_scored.pop(seq.id, None)
        return Event(seq.id, reason=reason, error=error, num_cached_tokens=self._num_cached.pop(seq.id, 0))

    def _unreported(self, row: Row, scores: tuple[TokenLogprobs, ...]) -> tuple[TokenLogprobs, ...]:
        start = row.start + 1
        num_reported = self._num_scored.get(row.seq_id, 1)
        self._num_scored[row.seq_id] = max(num_reported, start + len(scores))
        return scores[max(0, num_reported - start) :]

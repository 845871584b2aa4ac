"""`News`: what the readers of each sequence have been told, and the events that tell them the rest.

Owns which prefix hit and which prompt logprobs were told, and why sequences ended. Never changes a sequence. Called by
`Scheduler` when a step is committed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf

from penstock.sequence import FinishReason, Sequence
from penstock.step import Event, Row, RowResult, TokenLogprobs


def accept(seq: Sequence, tokens: SequenceOf[int]) -> tuple[int, FinishReason | None, int | None]:
    """Returns (how many of the sampled tokens count, why the sequence ends with the last of them, its stop token)."""
    stop_ids, room = seq.stop_ids, seq.max_len - len(seq.tokens)
    for count, token in enumerate(tokens, 1):
        # The sampler suppresses stop ids before min_tokens, so this is a second look.
        if token in stop_ids and seq.num_generated + count > seq.params.min_tokens:
            return count, FinishReason.STOP, token
        if count >= room:
            return count, FinishReason.LENGTH, None
    return len(tokens), None, None


class News:
    """Keeps something of a sequence only from its start to its terminal event."""

    def __init__(self) -> None:
        self.num_finished: Counter[FinishReason] = Counter()
        self._cached: dict[int, int] = {}  # first prefix hit, until told
        self._scored: dict[int, int] = {}  # prompt tokens whose logprobs were told; a victim computes them again

    def start(self, seq: Sequence) -> None:
        """A sequence runs for the first time; its first event will tell its prefix hit."""
        self._cached[seq.id] = seq.computed

    def of(
        self, row: Row, out: RowResult, count: int, reason: FinishReason | None, stop: int | None, version: int
    ) -> Event | None:
        """The event of a row of which `count` tokens were accepted; None without news."""
        scores = self._untold(row, out.prompt_logprobs) if out.prompt_logprobs else ()
        if not count and not scores:
            return None
        if reason is not None:
            self._forget(row.seq_id, reason)
        cached = self._cached.pop(row.seq_id, 0)
        tokens, logprobs = out.tokens[:count], out.logprobs[:count]
        event = Event(row.seq_id, tokens, logprobs, scores, reason, stop, None, cached, version)
        if not row.draft:
            return event
        return event._replace(num_drafted_tokens=len(row.draft), num_accepted_tokens=min(count, out.num_accepted))

    def whole(
        self, seq: Sequence, entries: tuple[TokenLogprobs, ...], reason: FinishReason, stop: int | None, version: int
    ) -> Event:
        """The one event of a sequence that nothing was told of before it ended."""
        self._forget(seq.id, reason)
        cached, tokens = self._cached.pop(seq.id, 0), tuple(entry.token for entry in entries)
        return Event(seq.id, tokens, entries, (), reason, stop, None, cached, version)

    def end(self, seq: Sequence, reason: FinishReason, error: Exception | None) -> Event:
        """The terminal event of a sequence that ends without a token."""
        self._forget(seq.id, reason)
        return Event(seq.id, reason=reason, error=error, num_cached_tokens=self._cached.pop(seq.id, 0))

    def _untold(self, row: Row, scores: tuple[TokenLogprobs, ...]) -> tuple[TokenLogprobs, ...]:
        first = row.start + 1
        told = self._scored.get(row.seq_id, 1)
        self._scored[row.seq_id] = max(told, first + len(scores))
        return scores[max(0, told - first) :]

    def _forget(self, seq_id: int, reason: FinishReason) -> None:
        self._scored.pop(seq_id, None)
        self.num_finished[reason] += 1

"""`Overview`: what may be asked of a scheduler, about whom it has and how many.

Owns nothing and changes nothing. Asked by the engine's loop between steps; `Forecast` asks on callers'
threads, which may see a sequence a step too early or too late.
"""

from __future__ import annotations

from penstock.scheduling.budget import takes_draft
from penstock.scheduling.news import News
from penstock.scheduling.roster import Roster
from penstock.sequence import FinishReason, Sequence


class Overview:
    """The questions that a `Scheduler` answers."""

    _roster: Roster
    _news: News

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._roster.live)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that hold no blocks: in the queue, or waiting for others of their request."""
        return len(self._roster.live) - len(self._roster.running)

    @property
    def num_running(self) -> int:
        """Number of sequences that hold blocks."""
        return len(self._roster.running)

    @property
    def num_preemptions(self) -> int:
        """How often a running sequence had to go back to the queue."""
        return self._roster.num_preemptions

    @property
    def num_shortages(self) -> int:
        """How often a running sequence had to give way, another one or itself, because blocks lacked."""
        return self._roster.num_shortages

    @property
    def used_lengths(self) -> list[float]:
        """Which fractions of the tokens that they might have generated the latest sequences did that ended."""
        return list(self._roster.used_lengths)

    @property
    def next_deadline(self) -> float:
        """The earliest time at which `expire` may have something to do; infinity for never."""
        return self._roster.deadlines.next_time

    def get(self, seq_id: int) -> Sequence | None:
        """The sequence with this id, unless it ended."""
        return self._roster.live.get(seq_id)

    def sequences(self) -> list[Sequence]:
        """Every sequence that has not ended, in order of arrival here. Any thread may ask."""
        return list(self._roster.live.values())

    def decoding(self) -> list[Sequence]:
        """The sequences that a draft can be offered to, best first."""
        return [seq for seq in self._roster.running if takes_draft(seq)]

    def stats(self) -> dict[str, int]:
        """Counts: num_waiting and num_running now, num_preemptions and num_finished_<reason> since the start."""
        ended = {f"num_finished_{reason.value}": self._news.num_finished[reason] for reason in FinishReason}
        now = {"num_waiting": self.num_waiting, "num_running": self.num_running}
        return {**now, "num_preemptions": self.num_preemptions, **ended}

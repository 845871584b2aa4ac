"""`Roster`: which sequences are here, and in which order they wait, run and expire.

Owns their membership in the queue, the running set and the deadlines. Never changes a sequence. Called by `Scheduler`.
"""

from __future__ import annotations

from penstock.config import EngineConfig
from penstock.scheduling.deadlines import Deadlines
from penstock.scheduling.policy import AgingPolicy, Policy
from penstock.scheduling.queue import WaitingQueue
from penstock.scheduling.running import RunningSet
from penstock.sequence import Sequence


class Roster:
    """Every live sequence is in exactly one of `waiting` and `running`.

    Without a `policy` of the caller's, it is an `AgingPolicy` that follows the configuration.
    """

    def __init__(self, config: EngineConfig, policy: Policy | None = None) -> None:
        self._config = config
        self._boost_s = None if policy else config.priority_boost_threshold  # None: the policy is the caller's
        self.policy = policy = policy or AgingPolicy(config.priority_boost_threshold)
        self.live: dict[int, Sequence] = {}
        self.waiting = WaitingQueue(policy)
        self.running = RunningSet()
        self.deadlines = Deadlines()
        self.num_preemptions = 0
        self._victim_counts: dict[int, int] = {}

    def add(self, seq: Sequence, now: float) -> None:
        """A new sequence waits."""
        assert seq.id not in self.live
        self.live[seq.id] = seq
        self.deadlines.add(seq)
        self.waiting.push(seq, now)

    def start(self, seq: Sequence) -> bool:
        """A waiting sequence runs; returns whether for the first time."""
        self.waiting.remove(seq.id)
        num_preemptions = self._victim_counts.get(seq.id, 0)
        self.running.add(seq, self.policy.standing(seq, num_preemptions))
        return not num_preemptions

    def stop(self, seq: Sequence, now: float) -> None:
        """A running sequence waits again, as long as since its arrival."""
        self.num_preemptions += 1
        self._victim_counts[seq.id] = self._victim_counts.get(seq.id, 0) + 1
        self.running.remove(seq.id)
        self.waiting.push(seq, now)

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence."""
        if not self.waiting.remove(seq.id):
            self.running.remove(seq.id)
        self.deadlines.forget(seq.id)
        self._victim_counts.pop(seq.id, None)
        del self.live[seq.id]

    def refresh(self, now: float) -> None:
        """Bring the order of those who wait up to date; the running ones keep theirs."""
        boost_s = self._config.priority_boost_threshold
        if self._boost_s not in (None, boost_s):
            self._boost_s, self.policy = boost_s, AgingPolicy(boost_s)
            self.waiting.change_policy(self.policy, now)
        self.waiting.advance(now)

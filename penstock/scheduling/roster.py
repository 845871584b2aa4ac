"""`Roster`: which sequences are here, and in which order they wait, run and expire.

Owns their membership in the queue, the running set and the deadlines. Never changes a sequence. Called by `Scheduler`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from penstock.config import EngineConfig
from penstock.scheduling.deadlines import Deadlines
from penstock.scheduling.policy import AgingPolicy, Policy
from penstock.scheduling.queue import WaitingQueue
from penstock.scheduling.running import RunningSet
from penstock.sequence import FinishReason, Sequence

_REMEMBERED = 64  # lengths of sequences that ended by themselves


class Roster:
    """Every live sequence is in exactly one of `waiting` and `running`, or held back for others of its request.

    Without a `policy` of the caller's, it is an `AgingPolicy` that follows the configuration.
    """

    def __init__(self, config: EngineConfig, policy: Policy | None = None) -> None:
        self._config = config
        self._boost_s = None if policy else config.priority_boost_threshold  # None: the policy is the caller's
        self.policy = policy = policy or AgingPolicy(config.priority_boost_threshold)
        self.live: dict[int, Sequence] = {}
        self.waiting: WaitingQueue[Sequence] = WaitingQueue(policy)
        self.running = RunningSet()
        self.deadlines = Deadlines()
        self.num_preemptions = 0
        self.num_shortages = 0
        self.now = 0.0  # when time was last told
        self.used_lengths: deque[float] = deque(maxlen=_REMEMBERED)  # tokens generated of those allowed
        self._victim_counts: dict[int, int] = {}
        self._siblings: dict[int, list[Sequence]] = {}  # by whose first draw they wait for

    def add(self, seq: Sequence, now: float) -> None:
        """A new sequence waits: in the queue, or for its parent's first draw, from whose logits it draws too."""
        self.now = now
        self.hold([seq])
        parent = seq.parent
        if parent is not None and parent.id in self.live and _draws_with(parent, seq):
            self._siblings.setdefault(parent.id, []).append(seq)
        else:
            self.waiting.push(seq, now)

    def hold(self, seqs: Iterable[Sequence]) -> None:
        """New sequences that are not in the queue until `requeue`."""
        for seq in seqs:
            assert seq.id not in self.live
            self.live[seq.id] = seq
            self.deadlines.add(seq)

    def requeue(self, seq: Sequence) -> None:
        """One that was held back waits like everybody."""
        self.waiting.push(seq, self.now)

    def siblings_of(self, seq: Sequence) -> SequenceOf[Sequence]:
        """Those who wait for this one's first draw."""
        return self._siblings.get(seq.id, ())

    def let_siblings_go(self, seq: Sequence) -> None:
        """There is nothing to wait for any more."""
        for sibling in self._siblings.pop(seq.id, ()):
            self.requeue(sibling)

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
        self.let_siblings_go(seq)
        if seq.id in self.running:
            self.running.remove(seq.id)
        elif not self.waiting.remove(seq.id) and seq.parent is not None:
            siblings = self._siblings.get(seq.parent.id, [])
            siblings[:] = [sibling for sibling in siblings if sibling is not seq]
        self.deadlines.forget(seq.id)
        self._victim_counts.pop(seq.id, None)
        del self.live[seq.id]
        if seq.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.used_lengths.append(seq.num_generated / (seq.max_len - seq.prompt_len))

    def refresh(self, now: float) -> None:
        """Bring the order of those who wait up to date; the running ones keep theirs."""
        self.now = now
        boost_s = self._config.priority_boost_threshold
        if self._boost_s not in (None, boost_s):
            self._boost_s, self.policy = boost_s, AgingPolicy(boost_s)
            self.waiting.change_policy(self.policy, now)
        self.waiting.advance(now)


def _draws_with(parent: Sequence, seq: Sequence) -> bool:
    """Whether the first tokens of both are drawn after the same prompt. One that wants it scored runs by itself."""
    same = parent.request_id == seq.request_id and not parent.num_generated and seq.params.prompt_logprobs is None
    return same and parent.tokens == seq.tokens

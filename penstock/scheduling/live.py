"""`LiveSequences`: every sequence that has not ended, and its moves between the queue, the running set and its end.

Owns `Sequence.status`, the membership in `waiting` and `running`, and the deadlines. Never decides on a move. Called by
`Scheduler`, `StepPlanner` and `Searches`.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.errors import EngineOverloaded
from penstock.scheduling.policy import AgingPolicy, Key, Policy
from penstock.scheduling.queue import WaitingQueue
from penstock.sequence import FinishReason, Sequence, Status

_NUM_FRACTIONS = 64  # sequences that ended by themselves and whose length is remembered
_SLACK = 64  # stale heap entries that are not worth a rebuild
_LEGAL_MOVES = {
    Status.WAITING: (Status.RUNNING, Status.FINISHED),
    Status.RUNNING: (Status.WAITING, Status.FINISHED),
    Status.FINISHED: (),
}


class RunningSet:
    """The running `sequences`, best first, beside a list of their keys. Others may read the list, but not change it.

    The order changes only when a sequence starts or stops. `rank` is the class that a sequence defends: minus the first
    element of its key.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self._keys: list[Key] = []
        self._key_of: dict[int, Key] = {}

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.sequences)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._key_of

    def add(self, seq: Sequence, key: Key) -> None:
        """Insert a sequence at the position of its key."""
        i = bisect_left(self._keys, key)
        self._keys.insert(i, key)
        self.sequences.insert(i, seq)
        self._key_of[seq.id] = key

    def remove(self, seq_id: int) -> None:
        """Take a sequence out."""
        i = bisect_left(self._keys, self._key_of.pop(seq_id))
        del self._keys[i]
        del self.sequences[i]

    def rank(self, seq: Sequence) -> int:
        """The class that this sequence defends."""
        return -self._key_of[seq.id][0]

    def lowest_rank(self) -> float:
        """The class that the worst sequence defends; infinity when none runs."""
        return -self._keys[-1][0] if self._keys else math.inf

    def unplanned(self) -> Iterator[Sequence]:
        """The sequences without a row in the step, worst first."""
        return (seq for seq in reversed(self.sequences) if not seq.in_flight)


class Deadlines:
    """A heap of the finite deadlines with lazy deletion, so that it costs nothing when there are none."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bool, Sequence]] = []
        self._watched: set[int] = set()

    def add(self, seq: Sequence) -> None:
        """Watch a sequence, if it has a deadline at all."""
        for time_s, is_ttft in ((seq.deadline, False), (seq.ttft_deadline, True)):
            if time_s < math.inf:
                heapq.heappush(self._heap, (time_s, seq.id, is_ttft, seq))
                self._watched.add(seq.id)

    def discard(self, seq_id: int) -> None:
        """Stop watching a sequence."""
        self._watched.discard(seq_id)
        if not self._watched:
            self._heap.clear()  # keep no ended sequence alive
        elif len(self._heap) > 4 * len(self._watched) + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._watched]
            heapq.heapify(self._heap)

    def take_expired(self, now: float) -> list[Sequence]:
        """Take out the sequences whose deadline is not after `now`; a first-token one counts only without a token."""
        expired: list[Sequence] = []
        while self._heap and self._heap[0][0] <= now:
            _, seq_id, is_ttft, seq = heapq.heappop(self._heap)
            if seq_id in self._watched and not (is_ttft and seq.num_generated):
                expired.append(seq)
        return expired

    @property
    def next_time(self) -> float:
        """The earliest time at which a sequence may expire; infinity for never."""
        while self._heap and self._heap[0][1] not in self._watched:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf


class LiveSequences:
    """Every live sequence is either in `waiting`, or in `running`, or withheld until others of its request are ready.

    Between `hold` and `release_held`, sequences that were not running or had run by then are kept out of `waiting`.
    Without a `policy` of the caller's, it is an `AgingPolicy` that follows the configuration.
    """

    def __init__(self, config: EngineConfig, cache: CacheManager, policy: Policy | None = None) -> None:
        self._config = config
        self._cache = cache
        self._boost_s = None if policy else config.priority_boost_threshold  # None: the policy is the caller's
        self.policy = policy = policy or AgingPolicy(config.priority_boost_threshold)
        self.by_id: dict[int, Sequence] = {}
        self.waiting: WaitingQueue[Sequence] = WaitingQueue(policy)
        self.running = RunningSet()
        self.deadlines = Deadlines()
        self.now = 0.0  # the latest time given to `add` or `refresh`
        self.num_preemptions = 0
        self.num_shortages = 0
        self.num_finished: Counter[FinishReason] = Counter()
        self.num_displaced = 0  # gave their place in the queue to a higher class
        self.used_fractions: deque[float] = deque(maxlen=_NUM_FRACTIONS)  # tokens generated of those allowed
        self._preemption_counts: dict[int, int] = {}
        self._siblings: dict[int, list[Sequence]] = {}  # by the sequence whose first sample they wait for
        self._admitted: frozenset[int] | None = None  # ids of the sequences that may enter the queue; None: all
        self._held: dict[int, Sequence] = {}  # those that wait for `release_held`

    def add(self, seq: Sequence, now: float) -> None:
        """Queue a new sequence, or withhold it until its parent samples, if it samples from the same logits."""
        self.now = now
        self.withhold([seq])
        parent = seq.parent
        if parent is not None and parent.id in self.by_id and _shares_first_sample(parent, seq):
            self._siblings.setdefault(parent.id, []).append(seq)
        elif self._admitted is None:
            self.waiting.push(seq, now)
        else:
            self.enqueue(seq)

    def withhold(self, seqs: Iterable[Sequence]) -> None:
        """Take in new sequences that stay out of the queue until `enqueue`."""
        for seq in seqs:
            assert seq.id not in self.by_id
            self.by_id[seq.id] = seq
            self.deadlines.add(seq)

    def enqueue(self, seq: Sequence) -> None:
        """Queue a sequence that was withheld."""
        if self._admitted is None or seq.id in self._admitted:
            self.waiting.push(seq, self.now)
        else:
            self._held[seq.id] = seq

    def hold(self, admitted: Iterable[int]) -> None:
        """Keep all sequences but these out of the queue until `release_held`, those in it now and later ones."""
        self._admitted = frozenset(admitted)
        for seq in [seq for seq in self.waiting if seq.id not in self._admitted]:
            self.waiting.remove(seq.id)
            self._held[seq.id] = seq

    def release_held(self) -> None:
        """Queue the sequences that were held."""
        self._admitted = None
        held, self._held = self._held, {}
        for seq in held.values():
            self.enqueue(seq)

    def is_any_admitted(self) -> bool:
        """Whether a sequence that `hold` admitted has not ended."""
        return any(seq_id in self.by_id for seq_id in self._admitted or ())

    def has_waiting(self) -> bool:
        """Whether any sequence waits, in the queue or withheld."""
        return len(self.by_id) > len(self.running.sequences)

    def siblings_of(self, seq: Sequence) -> SequenceOf[Sequence]:
        """The sequences that take their first sample from this one's logits."""
        return self._siblings.get(seq.id, ())

    def enqueue_siblings(self, seq: Sequence) -> None:
        """Queue the siblings that waited for this sequence's first sample."""
        for sibling in self._siblings.pop(seq.id, ()):
            self.enqueue(sibling)

    def start(self, seq: Sequence) -> bool:
        """Move a waiting sequence, which has its blocks, to the running ones; whether for the first time."""
        num_preemptions = self._preemption_counts.get(seq.id, 0)
        self._move(seq, Status.RUNNING)
        self.waiting.remove(seq.id)
        self.running.add(seq, self.policy.running_key(seq, num_preemptions))
        return not num_preemptions

    def preempt(self, seq: Sequence, *, for_blocks: bool = False) -> None:
        """Release the blocks of a running sequence and move it back to the queue, where it waits since its arrival.

        It keeps its tokens. Their K/V are computed again, except what the prefix cache still holds. `for_blocks` says
        that another sequence, or this one, lacked a block.
        """
        self._cache.release(seq)
        seq.computed = 0
        seq.draft = ()
        self._move(seq, Status.WAITING)
        self.num_preemptions += 1
        self.num_shortages += for_blocks
        self._preemption_counts[seq.id] = self._preemption_counts.get(seq.id, 0) + 1
        self.running.remove(seq.id)
        self.waiting.push(seq, self.now)

    def suspend(self, seq: Sequence) -> None:
        """Preempt a sequence, if it runs, and withhold it."""
        if seq.status is Status.RUNNING:
            self.preempt(seq)
            self.waiting.remove(seq.id)

    def finish(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        """End a sequence that no executing plan names: release its blocks and forget it."""
        self._cache.release(seq)
        seq.draft = ()
        self._move(seq, Status.FINISHED, reason)
        self.enqueue_siblings(seq)
        if seq.id in self.running:
            self.running.remove(seq.id)
        elif not self.waiting.remove(seq.id) and not self._held.pop(seq.id, None) and seq.parent is not None:
            siblings = self._siblings.get(seq.parent.id, [])
            siblings[:] = [sibling for sibling in siblings if sibling is not seq]
        self.deadlines.discard(seq.id)
        self._preemption_counts.pop(seq.id, None)
        del self.by_id[seq.id]
        if isinstance(error, EngineOverloaded):
            self.num_displaced += 1
        else:
            self.num_finished[reason] += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH) and seq.max_len > seq.prompt_len:
            self.used_fractions.append(seq.num_generated / (seq.max_len - seq.prompt_len))

    def refresh(self, now: float) -> None:
        """Bring the order of the waiting sequences up to date; the running ones keep theirs."""
        self.now = now
        boost_s = self._config.priority_boost_threshold
        if self._boost_s not in (None, boost_s):
            self._boost_s, self.policy = boost_s, AgingPolicy(boost_s)
            self.waiting.change_policy(self.policy, now)
        if self.has_waiting():
            self.waiting.advance(now)

    def _move(self, seq: Sequence, status: Status, reason: FinishReason | None = None) -> None:
        assert status in _LEGAL_MOVES[seq.status], f"{seq.status} to {status}"
        seq.status = status
        seq.reason = reason


def _shares_first_sample(parent: Sequence, seq: Sequence) -> bool:
    """Whether both take their first sample after the same prompt. A sequence with prompt logprobs runs by itself."""
    is_sibling = parent.request_id == seq.request_id and not parent.num_generated
    return is_sibling and not seq.scored and parent.tokens == seq.tokens

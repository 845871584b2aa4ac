"""`KeptAnswers`: which answers are kept, and which have to go.

Owns ids and sizes, not the answers. Answers that were read go first. Of those that nobody has read, the oldest of the
key that holds the most goes, so that no key drops the answers of another one that holds less. Called by `Futures`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

MAX_READ = 512  # answers that were read and may have been lost
MAX_UNREAD = 1 << 14  # answers that nobody has asked for yet


class _Queue:
    """Answers, the oldest first, and their bytes."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[str, int] = OrderedDict()
        self.num_bytes = 0

    def add(self, request_id: str, size: int) -> None:
        self.sizes[request_id] = size
        self.num_bytes += size

    def pop(self, request_id: str) -> int | None:
        """Take an answer out; its size, or None if it is not here."""
        size = self.sizes.pop(request_id, None)
        self.num_bytes -= size or 0
        return size

    def pop_oldest(self) -> str:
        request_id = next(iter(self.sizes))
        self.pop(request_id)
        return request_id


class KeptAnswers:
    """At most `max_bytes` of answers, of which the caller adds none that is larger."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._read = _Queue()
        self._unread: dict[str, _Queue] = {}  # by owner; none of them is empty

    def add(self, request_id: str, owner: str, size: int) -> Iterator[str]:
        """Note an answer that nobody has read, of `size` bytes; the ids of those to drop."""
        self._unread.setdefault(owner, _Queue()).add(request_id, size)
        yield from self._excess()

    def read(self, request_id: str, owner: str) -> Iterator[str]:
        """Note that an answer was read, maybe again; the ids of those to drop."""
        size = self._pop_unread(request_id, owner)
        size = self._read.pop(request_id) if size is None else size
        if size is not None:
            self._read.add(request_id, size)
        yield from self._excess()

    def discard(self, request_id: str, owner: str) -> None:
        """Forget an answer, if it is there."""
        self._read.pop(request_id)
        self._pop_unread(request_id, owner)

    def _pop_unread(self, request_id: str, owner: str) -> int | None:
        queue = self._unread.get(owner)
        size = None if queue is None else queue.pop(request_id)
        if queue is not None and not queue.sizes:
            del self._unread[owner]
        return size

    def _excess(self) -> Iterator[str]:
        while len(self._read.sizes) > MAX_READ or (self._read.sizes and self._num_bytes() > self._max_bytes):
            yield self._read.pop_oldest()
        while sum(len(queue.sizes) for queue in self._unread.values()) > MAX_UNREAD:
            yield self._pop_oldest_of(max(self._unread, key=lambda owner: len(self._unread[owner].sizes)))
        while self._num_bytes() > self._max_bytes:
            yield self._pop_oldest_of(max(self._unread, key=lambda owner: self._unread[owner].num_bytes))

    def _pop_oldest_of(self, owner: str) -> str:
        request_id = next(iter(self._unread[owner].sizes))
        self._pop_unread(request_id, owner)
        return request_id

    def _num_bytes(self) -> int:
        return self._read.num_bytes + sum(queue.num_bytes for queue in self._unread.values())

"""`HostTier`: which evicted blocks lie in host memory, and what the step being planned moves there and back.

Owns the tier's places: the digest of what each holds, least recently used first. Never touches a tensor and never
takes a block: moves are only named, for the plan. Called by `CacheManager`; moves stay pending until `commit` or
`rollback`. A place keeps its content when it is read back, so that evicting the same block again moves nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

Moves = tuple[tuple[int, int], ...]


class HostTier:
    """`num_places` blocks of host memory, all free at first; with none, nothing is ever kept."""

    def __init__(self, num_places: int = 0) -> None:
        self.num_places = num_places
        self.num_moved_out = self.num_moved_in = 0
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._held: dict[bytes, int] = {}  # read by this step: nothing else may be put there before it is over
        self._num_touched = 0  # the first so many places were used at least once
        self._empty: list[int] = []  # those of them that hold nothing
        self._out: dict[int, tuple[bytes, int]] = {}  # place -> (digest, block) of this step
        self._in: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Number of places in use."""
        return len(self._places) + len(self._held)

    def __contains__(self, key: bytes) -> bool:
        """Whether a block with this digest can be read back."""
        return key in self._places or key in self._held

    def put(self, key: bytes, block: int) -> None:
        """Keep the content of a block that is being evicted, in the place of the least recently used one."""
        if key in self._places:
            self._places.move_to_end(key)
        elif key not in self._held and (place := self._take_place()) is not None:
            self._places[key] = place
            self._out[place] = (key, block)

    def hold(self, keys: Iterable[bytes]) -> None:
        """Blocks with these digests will be read in this step: until it is over nothing takes their places."""
        for key in keys:
            self._held[key] = self._places.pop(key)

    def read(self, key: bytes, block: int) -> None:
        """Read a held block back into the cache's `block`."""
        self._in.append((self._held[key], block))

    def moves(self) -> tuple[Moves, Moves]:
        """What this step moves: out, as (block, place), before anything else; then in, as (place, block)."""
        return tuple((block, place) for place, (_, block) in self._out.items()), tuple(self._in)

    def commit(self) -> None:
        """The step ran: what it read was used most recently."""
        self.num_moved_out += len(self._out)
        self.num_moved_in += len(self._in)
        self._settle()

    def rollback(self) -> None:
        """The step failed: nobody knows what its moves have written."""
        for key, _ in self._out.values():
            self._empty.append(self._held.pop(key) if key in self._held else self._places.pop(key))
        self._settle()

    def clear(self) -> None:
        """Keep nothing. A step that is executing may still move what it named."""
        self._empty += [*self._places.values(), *self._held.values()]
        for pending in (self._places, self._held, self._out, self._in):
            pending.clear()

    def empty_places(self) -> list[int]:
        """The places that hold nothing any more."""
        return list(self._empty)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        used = [*self._places.values(), *self._held.values()]
        assert sorted(used + self._empty) == list(range(self._num_touched)), "a place leaked or is used twice"
        assert self._num_touched <= self.num_places
        assert not self._places.keys() & self._held.keys(), "a digest has two places"
        named = {**self._places, **self._held}
        assert all(named.get(key) == place for place, (key, _) in self._out.items()), "a move out has no place"

    def _take_place(self) -> int | None:
        """An empty place, or one never used, or that of the least recently used; None while all are being read."""
        if self._empty:
            return self._empty.pop()
        if self._num_touched < self.num_places:
            self._num_touched += 1
            return self._num_touched - 1
        return self._places.popitem(last=False)[1] if self._places else None

    def _settle(self) -> None:
        self._places.update(self._held)
        for pending in (self._held, self._out, self._in):
            pending.clear()

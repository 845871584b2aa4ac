"""`HostTier`: which evicted blocks are in host memory, and what the step being planned moves there and back.

Owns the tier's places: the digest of the content of each, least recently used first. Never touches a tensor and never
takes a block: moves are only listed, for the plan. Called by `PrefixCache`; moves stay pending until `commit` or
`rollback`. A place keeps its content when it is read back, so evicting the same block again moves nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from penstock.cache.pool import Pairs


class HostTier:
    """`num_places` blocks of host memory, all free at first; 0 keeps nothing."""

    def __init__(self, num_places: int = 0) -> None:
        self.num_places = num_places
        self.num_moved_out = self.num_moved_in = 0
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._held: dict[bytes, int] = {}  # read by this step, until whose end nothing else may be put there
        self._num_touched = 0  # the first `_num_touched` places were used at least once
        self._empty: list[int] = []  # used places without content
        self._out: dict[int, tuple[bytes, int]] = {}  # place -> (digest, block) of this step
        self._in: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Number of places in use."""
        return len(self._places) + len(self._held)

    def __contains__(self, key: bytes) -> bool:
        """Whether a block with this digest can be read back."""
        return key in self._places or key in self._held

    def put(self, key: bytes, block: int) -> None:
        """Keep the content of a block that is being evicted; if necessary, in the least recently used place."""
        if key in self._places:
            self._places.move_to_end(key)
        elif key not in self._held and (place := self._take_place()) is not None:
            self._places[key] = place
            self._out[place] = (key, block)

    def hold(self, keys: Iterable[bytes]) -> None:
        """Reserve the places of these digests, which this step reads, until it is over."""
        for key in keys:
            self._held[key] = self._places.pop(key)

    def read(self, key: bytes, block: int) -> None:
        """Read a held block back into the cache's `block`."""
        self._in.append((self._held[key], block))

    def moves(self) -> tuple[Pairs, Pairs]:
        """What this step moves: first out, as (block, place), then in, as (place, block)."""
        return tuple((block, place) for place, (_, block) in self._out.items()), tuple(self._in)

    def commit(self) -> None:
        """The step ran: the places that it read are the most recently used ones."""
        self.num_moved_out += len(self._out)
        self.num_moved_in += len(self._in)
        self._settle()

    def rollback(self) -> None:
        """The step failed: the content of the places that it wrote is unknown."""
        for key, _ in self._out.values():
            self._empty.append(self._held.pop(key) if key in self._held else self._places.pop(key))
        self._settle()

    def clear(self) -> None:
        """Drop all content. A step that is executing may still make its moves."""
        self._empty += [*self._places.values(), *self._held.values()]
        for pending in (self._places, self._held, self._out, self._in):
            pending.clear()

    def empty_places(self) -> list[int]:
        """The places that no longer hold content."""
        return list(self._empty)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        used = [*self._places.values(), *self._held.values()]
        assert sorted(used + self._empty) == list(range(self._num_touched)), "a place leaked or is used twice"
        assert self._num_touched <= self.num_places
        assert not self._places.keys() & self._held.keys(), "a digest has two places"
        place_of = {**self._places, **self._held}
        assert all(place_of.get(key) == place for place, (key, _) in self._out.items()), "a move out has no place"

    def _take_place(self) -> int | None:
        """An empty place, else an unused one, else the least recently used one; None while all are being read."""
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

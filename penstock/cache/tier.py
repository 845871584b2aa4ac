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
        self._free = list(reversed(range(num_places)))
        self._out: dict[int, tuple[bytes, int]] = {}  # place -> (digest, block) of this step
        self._in: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Number of places in use."""
        return self.num_places - len(self._free)

    def __contains__(self, key: bytes) -> bool:
        """Whether a block with this digest can be read back."""
        return key in self._places or key in self._held

    def put(self, key: bytes, block: int) -> None:
        """Keep the content of a block that is being evicted, in the place of the least recently used one."""
        if key in self._places:
            self._places.move_to_end(key)
        elif key not in self._held and (self._free or self._places):
            place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
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
            self._free.append(self._held.pop(key) if key in self._held else self._places.pop(key))
        self._settle()

    def clear(self) -> None:
        """Keep nothing. A step that is executing may still move what it named."""
        self._free += [*self._places.values(), *self._held.values()]
        for pending in (self._places, self._held, self._out, self._in):
            pending.clear()

    def free_places(self) -> list[int]:
        """The places that hold nothing."""
        return list(self._free)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        used = [*self._places.values(), *self._held.values()]
        assert sorted(used + self._free) == list(range(self.num_places)), "a place leaked or is used twice"
        assert not self._places.keys() & self._held.keys(), "a digest has two places"
        named = {**self._places, **self._held}
        assert all(named.get(key) == place for place, (key, _) in self._out.items()), "a move out has no place"

    def _settle(self) -> None:
        self._places.update(self._held)
        for pending in (self._held, self._out, self._in):
            pending.clear()

"""A model of what the K/V slots hold, to see whether every position that a row reads has the right content."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from penstock.step import Row, StepPlan

Content = tuple[str, tuple[int, ...], int]  # who may share it, the tokens up to and with this one, the weights' version


class Slots:
    """Plays the executor's K/V cache: moves before copies, copies before writes, writes before reads."""

    def __init__(self, block_size: int, num_places: int = 0) -> None:
        self._block_size = block_size
        self._num_places = num_places
        self._content: dict[tuple[int, int], Content] = {}
        self._host: dict[int, list[Content | None]] = {}

    def move(self, plan: StepPlan) -> None:
        """Out to the host, then in from it, each all at once; only whole blocks go out, and none by two ways."""
        outs, ins = plan.swaps_out, plan.swaps_in
        for moves in (outs, ins):
            assert len({source for source, _ in moves}) == len({target for _, target in moves}) == len(moves)
        for block, place in outs:
            assert 0 <= place < self._num_places
            self._host[place] = [self._content.get((block, slot)) for slot in range(self._block_size)]
            assert None not in self._host[place], "a block went out that was never filled"
        for place, block in ins:
            for slot, content in enumerate(self._host[place]):
                self._put((block, slot), content)

    def copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        """All at once; no destination may be a source, or named twice."""
        sources, destinations = {source for source, _ in copies}, [destination for _, destination in copies]
        assert not sources & set(destinations)
        assert len(set(destinations)) == len(destinations)
        for source, destination in copies:
            for slot in range(self._block_size):
                self._put((destination, slot), self._content.get((source, slot)))

    def write(self, plan: StepPlan, scope: Callable[[Row], str], version: int) -> None:
        """Every row's share of the step; no two rows may write the same slot."""
        written = set()
        for row in plan.rows:
            tokens = (*row.tokens, *row.draft)
            for position, place in self._places(row, row.start):
                assert place not in written, "two rows write one slot"
                written.add(place)
                self._content[place] = (scope(row), tokens[: position + 1], version)

    def check(self, row: Row, scope: str, oldest_version: int) -> None:
        """Every position that the row reads holds K/V of its own prefix, of its own scope, new enough."""
        tokens = (*row.tokens, *row.draft)
        for position, place in self._places(row, 0):
            content = self._content.get(place)
            assert content is not None, f"position {position} of {row.seq_id} was never written"
            assert content[:2] == (scope, tokens[: position + 1]), f"position {position} of {row.seq_id} is wrong"
            assert content[2] >= oldest_version, "stale K/V was shared"

    def spoil(self, plan: StepPlan) -> None:
        """The step failed half way: whatever it would have written holds anything."""
        for _, place in plan.swaps_out:
            self._host[place] = [None] * self._block_size
        for _, destination in (*plan.copies, *plan.swaps_in):
            for slot in range(self._block_size):
                self._put((destination, slot), None)
        for row in plan.rows:
            for _, place in self._places(row, row.start):
                self._put(place, None)

    def _places(self, row: Row, start: int) -> Iterator[tuple[int, tuple[int, int]]]:
        for position in range(start, row.end):
            yield position, (row.blocks[position // self._block_size], position % self._block_size)

    def _put(self, place: tuple[int, int], content: Content | None) -> None:
        if content is None:
            self._content.pop(place, None)
        else:
            self._content[place] = content

"""`BeamSearch`: which beginnings of a text a beam search keeps, and when it is over.

Owns scores, hypotheses and slots, which are plain numbers; never a sequence, a block or a tensor. Fed with each beam's
best continuations by the scheduler, which then does as it says. Decides as `transformers` does (`_beam_search`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from penstock.sampling import SamplingParams
from penstock.sequence import FinishReason
from penstock.step import TokenLogprobs


class Watch(Protocol):
    """Looks for stop strings in one beam's text."""

    def after(self, token: int) -> Watch | None:
        """The same with one more token; None when that completes a stop string. May raise the request's error."""
        ...


class Move(NamedTuple):
    """Slot `slot` becomes the continuation of slot `source` by `token`."""

    slot: int
    source: int
    token: int


class Chain(NamedTuple):
    """A beam's tokens from its newest one backwards; beams share what they have in common."""

    before: Chain | None
    entry: TokenLogprobs

    def entries(self) -> tuple[TokenLogprobs, ...]:
        """In order of generation."""
        found, link = [], self
        while True:
            found.append(link.entry)
            if link.before is None:
                return tuple(reversed(found))
            link = link.before


class Hypothesis(NamedTuple):
    """A complete text: its length-normalised score, its tokens, and what ended it (`stop` is an id, if one did)."""

    score: float
    chain: Chain
    reason: FinishReason
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Beam:
    """What one slot holds: the sum of its tokens' scores, the tokens, and who watches their text, if anybody."""

    score: float = 0.0
    chain: Chain | None = None
    watch: Watch | None = None

    @property
    def newest(self) -> int:
        """The token to go on from; a beam that holds the prompt alone has none."""
        assert self.chain is not None
        return self.chain.entry.token


class Found(NamedTuple):
    """One continuation of the beam in `slot`, and what both together score."""

    score: float
    slot: int
    entry: TokenLogprobs


def num_candidates(width: int, num_stop_ids: int) -> int:
    """How many continuations to rank, so that `width` are left when each beam's stop ids are among the best."""
    return width * max(2, 1 + num_stop_ids)


def ranked(beams: Mapping[int, Beam], reports: Mapping[int, Sequence[TokenLogprobs]], count: int) -> list[Found]:
    """The `count` best of all beams' continuations, best first; of equal ones those of the better beam."""
    every = [Found(beam.score + entry.sampled, slot, entry) for slot, beam in beams.items() for entry in reports[slot]]
    return sorted(every, key=lambda found: -found.score)[:count]


def slots_for(sources: Sequence[int], width: int) -> list[int]:
    """A slot for each continuation: the first of a source stays in its slot, others take those nobody continues."""
    found = {source: i for i, source in reversed(list(enumerate(sources)))}
    free = iter(slot for slot in range(width) if slot not in found)
    return [source if found[source] == i else next(free) for i, source in enumerate(sources)]


class BeamSearch:
    """A search of `params.num_beams` slots, of which the first holds the prompt, for at most `longest` tokens.

    `stop_ids` end a text after `params.min_tokens`; `watch` does so by its text.
    """

    def __init__(
        self, params: SamplingParams, longest: int, stop_ids: frozenset[int], watch: Watch | None = None
    ) -> None:
        self.width = params.num_beams
        self.hypotheses: list[Hypothesis] = []
        self._params = params
        self._longest = longest
        self._stop_ids = stop_ids
        self._length = 0
        self._beams: dict[int, Beam] = {0: Beam(watch=watch)}
        self._reports: dict[int, Sequence[TokenLogprobs]] = {}

    @property
    def is_ready(self) -> bool:
        """Whether every beam has reported its continuations."""
        return len(self._reports) == len(self._beams)

    @property
    def reported(self) -> Iterable[int]:
        """The slots that have reported since the last advance."""
        return self._reports

    def outcome(self, slot: int) -> Hypothesis | None:
        """What this slot ends as, once the search is over; there may be fewer texts than slots."""
        return self.hypotheses[slot] if slot < len(self.hypotheses) else None

    def report(self, slot: int, candidates: Sequence[TokenLogprobs]) -> None:
        """The best continuations of one beam, best first."""
        assert slot in self._beams
        self._reports[slot] = candidates

    def advance(self) -> list[Move]:
        """One position on, once all beams have reported; those that change their slot come first.

        Slots that are not named hold nothing any more. No moves: the search is over, and `hypotheses` are its results,
        best first. Raises what a `Watch` raises.
        """
        self._length += 1
        beams, reports, self._reports = self._beams, self._reports, {}
        continued: list[tuple[int, Beam]] = []
        for place, found in enumerate(ranked(beams, reports, num_candidates(self.width, len(self._stop_ids)))):
            if len(continued) == self.width <= place:
                break
            before = beams[found.slot]
            chain = Chain(before.chain, found.entry)
            watch = before.watch and before.watch.after(found.entry.token)
            reason, stop = self._ending(found.entry.token, before.watch is not None and watch is None)
            if reason is not None and place < self.width:
                self._finish(Hypothesis(self._normalized(found.score, self._length), chain, reason, stop))
            elif reason is None and len(continued) < self.width:
                continued.append((found.slot, Beam(found.score, chain, watch)))
        if not continued or not self._is_worthwhile(continued[0][1].score):
            self._beams = {}
            return []
        return self._go_on(continued)

    def _ending(self, token: int, is_stopped: bool) -> tuple[FinishReason | None, int | None]:
        """Why a text ends with this token, and the stop id that it is, if so."""
        if token in self._stop_ids and self._length > self._params.min_tokens:
            return FinishReason.STOP, token
        if is_stopped:
            return FinishReason.STOP, None
        return (FinishReason.LENGTH if self._length >= self._longest else None), None

    def _finish(self, hypothesis: Hypothesis) -> None:
        """One more complete text; the best `width` are kept."""
        self.hypotheses.append(hypothesis)
        self.hypotheses.sort(key=lambda found: -found.score)
        del self.hypotheses[self.width :]

    def _is_worthwhile(self, best: float) -> bool:
        """Whether to go on when the best running beam scores `best`.

        With `early_stopping=True` a search is over once `width` texts are complete, else once that beam could not
        improve on the worst of them: as long as it is now, or, with "never", at the length that would suit it best.
        """
        if len(self.hypotheses) < self.width:
            return True
        if self._params.early_stopping is True:
            return False
        at_its_longest = self._params.early_stopping == "never" and self._params.length_penalty > 0
        possible = self._normalized(best, self._longest if at_its_longest else self._length)
        return possible > self.hypotheses[-1].score

    def _normalized(self, score: float, length: int) -> float:
        """A sum of log probabilities, made comparable between texts of different lengths."""
        return float(score / length**self._params.length_penalty)

    def _go_on(self, continued: Sequence[tuple[int, Beam]]) -> list[Move]:
        sources = [source for source, _ in continued]
        slots = slots_for(sources, self.width)
        self._beams = {slot: beam for slot, (_, beam) in zip(slots, continued, strict=True)}
        moves = [Move(slot, source, self._beams[slot].newest) for slot, source in zip(slots, sources, strict=True)]
        return sorted(moves, key=lambda move: move.slot == move.source)

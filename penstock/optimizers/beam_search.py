"""`BeamSearch`: which beams a beam search keeps, and when it ends.

Owns scores, hypotheses and slots, which are plain numbers; never a sequence, a block or a tensor. The scheduler reports
each beam's best continuations and carries out the moves. Decides as `transformers` does (`_beam_search`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from penstock.sampling import SamplingParams
from penstock.sequence import FinishReason
from penstock.step import TokenLogprobs


class StopStringMatcher(Protocol):
    """Looks for stop strings in one beam's text."""

    def after(self, token: int) -> StopStringMatcher | None:
        """The matcher for the text with one more token; None if that completes a stop string.

        May raise the request's error.
        """
        ...


class Move(NamedTuple):
    """Slot `slot` becomes the continuation of slot `source` by `token`."""

    slot: int
    source: int
    token: int


class Chain(NamedTuple):
    """A beam's tokens as a linked list from the newest backwards; beams share their common beginning."""

    previous: Chain | None
    entry: TokenLogprobs

    def entries(self) -> tuple[TokenLogprobs, ...]:
        """The tokens in order of generation."""
        entries, link = [], self
        while True:
            entries.append(link.entry)
            if link.previous is None:
                return tuple(reversed(entries))
            link = link.previous


class Hypothesis(NamedTuple):
    """A complete text: its length-normalised score, its tokens, and what ended it (`stop` is the stop id, if any)."""

    score: float
    chain: Chain
    reason: FinishReason
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Beam:
    """What one slot holds: the sum of its tokens' log probabilities, the tokens, and a matcher for stop strings."""

    score: float = 0.0
    chain: Chain | None = None
    matcher: StopStringMatcher | None = None

    @property
    def newest(self) -> int:
        """The last token; not for the beam that holds the prompt alone."""
        assert self.chain is not None
        return self.chain.entry.token


class Candidate(NamedTuple):
    """One continuation of the beam in `slot`, and the score of the beam with it."""

    score: float
    slot: int
    entry: TokenLogprobs


def num_candidates(width: int, num_stop_ids: int) -> int:
    """How many continuations to rank, so that `width` remain when each beam's stop ids are among the best."""
    return width * max(2, 1 + num_stop_ids)


def ranked(beams: Mapping[int, Beam], reports: Mapping[int, Sequence[TokenLogprobs]], count: int) -> list[Candidate]:
    """The `count` best continuations of all beams, best first; among equals those of the better beam."""
    candidates = [
        Candidate(beam.score + entry.sampled, slot, entry) for slot, beam in beams.items() for entry in reports[slot]
    ]
    return sorted(candidates, key=lambda candidate: -candidate.score)[:count]


def slots_for(sources: Sequence[int], width: int) -> list[int]:
    """A slot for each continuation: the first of a source stays in its slot, others take slots without one."""
    first_index = {source: i for i, source in reversed(list(enumerate(sources)))}
    free_slots = iter(slot for slot in range(width) if slot not in first_index)
    return [source if first_index[source] == i else next(free_slots) for i, source in enumerate(sources)]


class BeamSearch:
    """A search of `params.num_beams` slots, of which the first holds the prompt, for at most `max_tokens` tokens.

    `stop_ids` end a text after `params.min_tokens`; `matcher` ends it at a stop string.
    """

    def __init__(
        self,
        params: SamplingParams,
        max_tokens: int,
        stop_ids: frozenset[int],
        matcher: StopStringMatcher | None = None,
    ) -> None:
        self.width = params.num_beams
        self.hypotheses: list[Hypothesis] = []
        self._params = params
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._length = 0
        self._beams: dict[int, Beam] = {0: Beam(matcher=matcher)}
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
        """The result in this slot once the search has ended; there may be fewer results than slots."""
        return self.hypotheses[slot] if slot < len(self.hypotheses) else None

    def report(self, slot: int, candidates: Sequence[TokenLogprobs]) -> None:
        """Take the best continuations of one beam, best first."""
        assert slot in self._beams
        self._reports[slot] = candidates

    def forget_reports(self) -> list[int]:
        """Drop the continuations reported since the last advance; the slots that have to report again."""
        slots = list(self._reports)
        self._reports.clear()
        return slots

    def advance(self) -> list[Move]:
        """Advance by one token, once all beams have reported; moves that change the slot come first.

        Slots without a move are empty from now on. Without any move the search has ended, and `hypotheses` are its
        results, best first. Raises what a `StopStringMatcher` raises.
        """
        self._length += 1
        beams, reports, self._reports = self._beams, self._reports, {}
        continued: list[tuple[int, Beam]] = []
        for rank, candidate in enumerate(ranked(beams, reports, num_candidates(self.width, len(self._stop_ids)))):
            if len(continued) == self.width <= rank:
                break
            beam, token = beams[candidate.slot], candidate.entry.token
            chain = Chain(beam.chain, candidate.entry)
            matcher = beam.matcher and beam.matcher.after(token)
            reason, stop = self._ending(token, beam.matcher is not None and matcher is None)
            if reason is not None and rank < self.width:
                self._finish(Hypothesis(self._normalized(candidate.score, self._length), chain, reason, stop))
            elif reason is None and len(continued) < self.width:
                continued.append((candidate.slot, Beam(candidate.score, chain, matcher)))
        if not continued or not self._is_worthwhile(continued[0][1].score):
            self._beams = {}
            return []
        return self._moves(continued)

    def _ending(self, token: int, is_stopped: bool) -> tuple[FinishReason | None, int | None]:
        """Why a text ends with this token, if it does, and the stop id if the token is one."""
        if token in self._stop_ids and self._length > self._params.min_tokens:
            return FinishReason.STOP, token
        if is_stopped:
            return FinishReason.STOP, None
        return (FinishReason.LENGTH if self._length >= self._max_tokens else None), None

    def _finish(self, hypothesis: Hypothesis) -> None:
        """Add a complete text; only the best `width` are kept."""
        self.hypotheses.append(hypothesis)
        self.hypotheses.sort(key=lambda text: -text.score)
        del self.hypotheses[self.width :]

    def _is_worthwhile(self, best: float) -> bool:
        """Whether to go on when the best running beam scores `best`.

        With `early_stopping=True` a search ends once `width` texts are complete; otherwise once that beam could not
        beat the worst of them, scored at its present length or, with "never", at its most favourable one.
        """
        if len(self.hypotheses) < self.width:
            return True
        if self._params.early_stopping is True:
            return False
        use_max_length = self._params.early_stopping == "never" and self._params.length_penalty > 0
        possible = self._normalized(best, self._max_tokens if use_max_length else self._length)
        return possible > self.hypotheses[-1].score

    def _normalized(self, score: float, length: int) -> float:
        """A sum of log probabilities, made comparable between texts of different lengths."""
        return float(score / length**self._params.length_penalty)

    def _moves(self, continued: Sequence[tuple[int, Beam]]) -> list[Move]:
        sources = [source for source, _ in continued]
        slots = slots_for(sources, self.width)
        self._beams = {slot: beam for slot, (_, beam) in zip(slots, continued, strict=True)}
        moves = [Move(slot, source, self._beams[slot].newest) for slot, source in zip(slots, sources, strict=True)]
        return sorted(moves, key=lambda move: move.slot == move.source)

"""`ModelDrafter`: a smaller model guesses, greedily, what the large one will say.

Owns the small model's block tables and what it has computed of each sequence; a function runs the model itself. Runs
on the model's thread, where all sequences draft together; `forget` comes from the engine's.

Its guesses are its most likely tokens, whatever the request's parameters: with draws tied to positions (see
`verification`) these are accepted most often. How sure it was tells what a guess is worth, and drafting ends where the
next one would not be worth its making.
"""

from __future__ import annotations

from array import array
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from penstock.optimizers.speculation.drafter import NUM_KINDS, Ask, Draft
from penstock.sampling import SamplingParams
from penstock.step import Row, StepPlan

# Runs a step of the small model: each row's most likely next token and its probability, None where it draws none.
Guesser = Callable[[StepPlan], SequenceOf[tuple[int, float] | None]]

# Probabilities of a guess, under the model that makes it, at which its kind changes.
EDGES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
assert len(EDGES) == NUM_KINDS - 1
# So many tokens that the small model has not seen are worth making up for one that is still to come.
PATIENCE = 8
_GREEDY = SamplingParams(temperature=0.0, max_tokens=1)


@dataclass(slots=True, eq=False)
class _Reader:
    """What the small model knows of one sequence: `tokens`, of which the first `computed` have their K/V in `blocks`.

    The first `agreed` tokens are the sequence's own; those behind them are guesses.
    """

    tokens: list[int] = field(default_factory=list)
    blocks: array[int] = field(default_factory=lambda: array("i"))
    agreed: int = 0
    computed: int = 0

    def follow(self, tokens: SequenceOf[int]) -> None:
        """Go along with what the sequence has become; guesses that came true keep their K/V."""
        same, own = self.agreed, self.tokens
        most = min(len(own), len(tokens))
        while same < most and own[same] == tokens[same]:
            same += 1
        del own[same:]
        own += tokens[same:]
        self.agreed = len(tokens)
        self.computed = min(self.computed, same, len(tokens) - 1)

    @property
    def lag(self) -> int:
        """Number of tokens without K/V."""
        return len(self.tokens) - self.computed


@dataclass(slots=True, eq=False)
class _Guess:
    """A draft in the making; `gain` is the chance that all of it is right."""

    ask: Ask
    reader: _Reader
    tokens: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    gain: float = 1.0

    def note(self, token: int, probability: float) -> bool:
        """Take in one more guess; whether to go on. One that is not worth a place in the step still ends the draft."""
        kind = bisect(EDGES, probability)
        self.gain *= self.ask.chances[kind]
        self.tokens.append(token)
        self.kinds.append(kind)
        self.reader.tokens.append(token)
        return len(self.tokens) < self.ask.most and self.gain >= self.ask.least


class ModelDrafter:
    """A model of `max_length` positions with `num_blocks` blocks of `block_size` tokens, at most `max_tokens` a step.

    Sequences that were not drafted for lately give their blocks to those that are.
    """

    name = "draft_model"
    runs_model = True

    def __init__(self, guess: Guesser, *, max_length: int, num_blocks: int, block_size: int, max_tokens: int) -> None:
        self._guess = guess
        self._max_length = max_length
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._free = list(range(num_blocks))
        self._readers: OrderedDict[int, _Reader] = OrderedDict()  # drafted for least recently first
        self._num_drafting = 0  # so many of the last ones are drafted for now
        self._ended: deque[int] = deque()

    def unused(self) -> list[int]:
        """The blocks that hold nothing of a sequence that still runs, in order. On the thread of `propose`."""
        self._close_ended()
        return sorted(self._free)

    def forget(self, seq_id: int) -> None:
        """Its blocks are free from the next drafting on. From any thread."""
        self._ended.append(seq_id)

    def propose(self, asks: SequenceOf[Ask]) -> list[Draft]:
        """A draft for each ask, in order; none where the model still has to read what came before."""
        self._close_ended()
        guesses = [_Guess(ask, self._reader(ask)) for ask in asks]
        going = [guess for guess in guesses if self._is_worthwhile(guess)]
        for guess in going:
            self._readers.move_to_end(guess.ask.seq.id)
        self._num_drafting = len(going)
        while going:
            going = self._step(going)
        return [Draft(tuple(guess.tokens), tuple(guess.kinds)) for guess in guesses]

    def _reader(self, ask: Ask) -> _Reader:
        seq = ask.seq
        reader = self._readers.get(seq.id)
        if reader is None:
            reader = self._readers[seq.id] = _Reader()
        reader.follow(seq.tokens)
        return reader

    def _is_worthwhile(self, guess: _Guess) -> bool:
        seq = guess.ask.seq
        fits = seq.length + guess.ask.most <= self._max_length
        return fits and guess.reader.lag <= PATIENCE * (seq.max_len - seq.length) + 1

    def _step(self, going: SequenceOf[_Guess]) -> list[_Guess]:
        """One step of the model; those that go on."""
        rows, planned, tokens = [], [], self._max_tokens
        for guess in going:
            row = self._row(guess, tokens)
            if row is not None:
                rows.append(row)
                planned.append(guess)
                tokens -= row.end - row.start
        if not rows:
            return []
        found = self._guess(StepPlan(tuple(rows)))
        going = []
        for guess, row, best in zip(planned, rows, found, strict=True):
            guess.reader.computed = row.end
            if best is not None and guess.note(*best):
                going.append(guess)
        return going

    def _row(self, guess: _Guess, most: int) -> Row | None:
        """The reader's next tokens, at most so many; None where there is no room for any."""
        reader, seq = guess.reader, guess.ask.seq
        end = reader.computed + min(reader.lag, most)
        if end == reader.computed or not self._reserve(reader, end):
            return None
        samples = end == len(reader.tokens)
        return Row(seq.id, reader.tokens, reader.computed, end, reader.blocks, samples, _GREEDY, seq.prompt_len)

    def _reserve(self, reader: _Reader, end: int) -> bool:
        """Make positions < `end` writable, at the cost of sequences not drafted for now. False for lack of blocks."""
        missing = -(-end // self._block_size) - len(reader.blocks)
        while missing > len(self._free) and len(self._readers) > self._num_drafting:
            self._close(next(iter(self._readers)))
        if missing > len(self._free):
            return False
        reader.blocks.extend(self._free.pop() for _ in range(missing))
        return True

    def _close_ended(self) -> None:
        while self._ended:
            self._close(self._ended.popleft())

    def _close(self, seq_id: int) -> None:
        reader = self._readers.pop(seq_id, None)
        if reader is not None:
            self._free.extend(reader.blocks)

"""`SuffixDrafter`: guesses that a sequence repeats itself, or what other requests of its namespace were answered.

Owns, beside an index per sequence, one per namespace of what was generated there, in bounded memory: texts that
helped nobody for longest go first. Consulted on the engine's thread. The idea is that of [1], over hash chains in
place of a suffix tree. [1] Oliaro et al. 2024, https://arxiv.org/abs/2411.04975.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence as SequenceOf
from itertools import count

from penstock.optimizers.speculation.drafter import Ask, Draft
from penstock.optimizers.speculation.follower import Follower
from penstock.optimizers.speculation.index import KEY_TOKENS, Text, TextIndex
from penstock.optimizers.speculation.ngram import OwnText
from penstock.sequence import Sequence

CAPACITY = 256 * 1024  # tokens, at about 120 bytes each


class Library:
    """What was generated in each namespace. At most `capacity` tokens; the least recently useful text goes first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._numbers = count()
        self._indexes: defaultdict[str, TextIndex] = defaultdict(TextIndex)
        self._texts: OrderedDict[int, tuple[str, Text]] = OrderedDict()
        self.size = 0

    def index(self, namespace: str) -> TextIndex:
        """The texts of one namespace."""
        return self._indexes[namespace]

    def open(self, namespace: str, tokens: list[int]) -> Text:
        """Hold a new text; `tokens` may grow from here on, see `grow`."""
        text = self._indexes[namespace].add(next(self._numbers), tokens)
        self._texts[text.number] = namespace, text
        return text

    def holds(self, text: Text) -> bool:
        """Whether the text is still held."""
        return text.number in self._texts

    def grow(self, text: Text) -> None:
        """Take in what was appended to a text that is held."""
        namespace, _ = self._texts[text.number]
        before = len(text.before)
        self._indexes[namespace].grow(text)
        self.size += len(text.before) - before
        self.note_use(text)
        while self.size > self._capacity:
            self._drop_oldest()

    def note_use(self, text: Text) -> None:
        """The text was of use just now."""
        if self.holds(text):
            self._texts.move_to_end(text.number)

    def _drop_oldest(self) -> None:
        _, (namespace, text) = self._texts.popitem(last=False)
        self._indexes[namespace].drop(text)
        self.size -= len(text.before)
        if not len(self._indexes[namespace]):
            del self._indexes[namespace]


class _Voice:
    """One live sequence: its own text, its place in those of others, and what it adds to them."""

    def __init__(self, seq: Sequence, library: Library) -> None:
        self._seq = seq
        self._library = library
        self._own = OwnText(seq)
        self._others = Follower()
        self._num_said = max(0, seq.prompt_len - KEY_TOKENS)  # of the prompt, only what leads to the output
        self._open()

    def propose(self, count: int) -> Draft:
        """What followed the longest match, in its own text or in those of others."""
        own, others, tokens = self._own.follow(), self._others, self._seq.tokens
        self.contribute()
        others.follow(tokens)
        if others.match is None:
            others.match = self._library.index(self._seq.namespace).find(tokens)
        if others.match is None or others.match.length <= own:
            return self._own.read(count) if own else Draft()
        self._library.note_use(others.match.text)
        return others.read(count, own=False)

    def contribute(self) -> None:
        """Let others find what the sequence has said since the last call."""
        if not self._library.holds(self._text):
            self._open()
        tokens = self._seq.tokens
        self._said += tokens[self._num_said :]
        self._num_said = len(tokens)
        self._library.grow(self._text)

    def _open(self) -> None:
        self._said: list[int] = []
        self._text = self._library.open(self._seq.namespace, self._said)


class SuffixDrafter:
    """`capacity` is the most tokens that are kept of all namespaces together."""

    name = "suffix"
    runs_model = False

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._library = Library(capacity)
        self._voices: dict[int, _Voice] = {}

    @property
    def num_tokens(self) -> int:
        """How many generated tokens are held for everybody."""
        return self._library.size

    def propose(self, asks: SequenceOf[Ask]) -> list[Draft]:
        """A draft for each ask, in order."""
        return [self._propose(ask) for ask in asks]

    def forget(self, seq_id: int) -> None:
        """The sequence ended; what it said stays for others."""
        voice = self._voices.pop(seq_id, None)
        if voice is not None:
            voice.contribute()

    def _propose(self, ask: Ask) -> Draft:
        voice = self._voices.get(ask.seq.id)
        if voice is None:
            voice = self._voices[ask.seq.id] = _Voice(ask.seq, self._library)
        return voice.propose(ask.most)

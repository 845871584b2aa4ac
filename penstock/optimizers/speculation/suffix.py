"""`SuffixDrafter`: drafts that a sequence repeats itself or the output of another request of its namespace.

Owns an index per sequence and, in bounded memory, one of the generated text per namespace; the text that was least
recently useful is dropped first. Called on the engine's thread. The idea is that of [1], with hash chains in place of
a suffix tree. [1] Oliaro et al. 2024, https://arxiv.org/abs/2411.04975.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence as SequenceOf
from itertools import count

from penstock.optimizers.speculation.drafter import Draft, DraftRequest
from penstock.optimizers.speculation.ngram import OwnText
from penstock.optimizers.speculation.text_index import KEY_TOKENS, MatchCursor, Text, TextIndex
from penstock.sequence import Sequence

CAPACITY = 256 * 1024  # tokens, at about 120 bytes each


class GeneratedTexts:
    """The generated text of each namespace: at most `capacity` tokens, the least recently useful dropped first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._numbers = count()
        self._indexes: defaultdict[str, TextIndex] = defaultdict(TextIndex)
        self._texts: OrderedDict[int, tuple[str, Text]] = OrderedDict()
        self.num_tokens = 0

    def index(self, namespace: str) -> TextIndex:
        """The texts of one namespace."""
        return self._indexes[namespace]

    def open(self, namespace: str, tokens: list[int]) -> Text:
        """Hold a new text; `tokens` may grow from here on, see `grow`."""
        text = self._indexes[namespace].add(next(self._numbers), tokens)
        self._texts[text.number] = namespace, text
        return text

    def holds(self, text: Text) -> bool:
        """Whether the text was not dropped."""
        return text.number in self._texts

    def grow(self, text: Text) -> None:
        """Index the tokens appended to a text that is held."""
        namespace, _ = self._texts[text.number]
        num_indexed = len(text.previous)
        self._indexes[namespace].grow(text)
        self.num_tokens += len(text.previous) - num_indexed
        self.mark_used(text)
        while self.num_tokens > self._capacity:
            self._drop_oldest()

    def mark_used(self, text: Text) -> None:
        """Make the text the last to be dropped."""
        if self.holds(text):
            self._texts.move_to_end(text.number)

    def _drop_oldest(self) -> None:
        _, (namespace, text) = self._texts.popitem(last=False)
        self._indexes[namespace].drop(text)
        self.num_tokens -= len(text.previous)
        if not len(self._indexes[namespace]):
            del self._indexes[namespace]


class _SequenceState:
    """One live sequence: its own text, its place in those of others, and its output for them."""

    def __init__(self, seq: Sequence, texts: GeneratedTexts) -> None:
        self._seq = seq
        self._texts = texts
        self._own_text = OwnText(seq)
        self._cursor = MatchCursor()
        self._num_shared = max(0, seq.prompt_len - KEY_TOKENS)  # of the prompt, only the tokens that lead to the output
        self._open()

    def propose(self, count: int) -> Draft:
        """The tokens that followed the longest match, in its own text or in those of others."""
        own_length, cursor, tokens = self._own_text.update(), self._cursor, self._seq.tokens
        self.share()
        cursor.advance(tokens)
        if cursor.match is None:
            cursor.match = self._texts.index(self._seq.namespace).find(tokens)
        if cursor.match is None or cursor.match.length <= own_length:
            return self._own_text.read(count) if own_length else Draft()
        self._texts.mark_used(cursor.match.text)
        return cursor.read(count, repeat=False)

    def share(self) -> None:
        """Add the tokens generated since the last call to the namespace's texts."""
        if not self._texts.holds(self._text):
            self._open()
        tokens = self._seq.tokens
        self._output += tokens[self._num_shared :]
        self._num_shared = len(tokens)
        self._texts.grow(self._text)

    def _open(self) -> None:
        self._output: list[int] = []
        self._text = self._texts.open(self._seq.namespace, self._output)


class SuffixDrafter:
    """`capacity` is the maximum number of generated tokens held, all namespaces together."""

    name = "suffix"
    runs_model = False

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._texts = GeneratedTexts(capacity)
        self._states: dict[int, _SequenceState] = {}

    @property
    def num_tokens(self) -> int:
        """How many generated tokens are held."""
        return self._texts.num_tokens

    def propose(self, requests: SequenceOf[DraftRequest]) -> list[Draft]:
        """A draft for each request, in order."""
        return [self._propose(request) for request in requests]

    def forget(self, seq_id: int) -> None:
        """The sequence ended; its output stays for others."""
        state = self._states.pop(seq_id, None)
        if state is not None:
            state.share()

    def _propose(self, request: DraftRequest) -> Draft:
        state = self._states.get(request.seq.id)
        if state is None:
            state = self._states[request.seq.id] = _SequenceState(request.seq, self._texts)
        return state.propose(request.max_tokens)

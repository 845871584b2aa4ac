"""`GrammarCompiler`: compiled grammars for one engine's tokenizer, the latest of them kept.

Owns the cache and the vocabulary, which is made for the first grammar. Imports llguidance when it compiles. `compile`
runs on the tokenizers' threads, `find` on the engine's.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol

from penstock.constraint import Constraint, MaskFiller
from penstock.errors import GrammarError, concerning
from penstock.structured_outputs import StructuredOutputs

MAX_GRAMMARS = 64
_Key = tuple[StructuredOutputs, str | None]


class CompiledGrammar(Protocol):
    """What `compile` returns: makes the constraint of each sequence of a request."""

    @property
    def is_usable(self) -> bool:
        """Whether further sequences may begin with it; if not, it has to be compiled again."""
        ...

    def start(self, *, ends_itself: bool) -> Constraint:
        """A constraint for a sequence without output."""
        ...


class GrammarCompiler:
    """`num_logits` is the width of the model's logits, `eos_ids` are all tokens with which it ends a text."""

    def __init__(self, num_logits: int, eos_ids: Collection[int], max_grammars: int = MAX_GRAMMARS) -> None:
        self._num_logits = num_logits
        self._eos_ids = frozenset(eos_ids)
        self._max_grammars = max_grammars
        self._grammars: OrderedDict[_Key, CompiledGrammar] = OrderedDict()
        self._vocabulary: MaskFiller | None = None
        self._lock = threading.Lock()  # of the cache
        self._vocabulary_lock = threading.Lock()

    def find(self, structured: StructuredOutputs, reasoning_end: str | None) -> CompiledGrammar | None:
        """The grammar, if it was compiled lately."""
        with self._lock:
            grammar = self._grammars.pop((structured, reasoning_end), None)
            if grammar is None or not grammar.is_usable:
                return None
            self._grammars[structured, reasoning_end] = grammar  # the latest now
            return grammar

    @concerning("structured_outputs")
    def compile(self, structured: StructuredOutputs, reasoning_end: str | None, tokenizer: object) -> CompiledGrammar:
        """The grammar, compiled now or lately. `tokenizer` is the calling thread's own copy. Raises `GrammarError`."""
        if (known := self.find(structured, reasoning_end)) is not None:
            return known
        try:
            from penstock.constraints.grammar import Grammar
            from penstock.constraints.matching import GrammarVocabulary, vocabulary_of
        except ImportError:
            raise GrammarError("structured outputs need llguidance: pip install 'penstock[structured]'") from None
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = vocabulary_of(tokenizer, self._num_logits, self._eos_ids)
            vocabulary = self._vocabulary
            assert isinstance(vocabulary, GrammarVocabulary)
        grammar = Grammar(structured, reasoning_end, vocabulary)
        with self._lock:
            self._grammars[structured, reasoning_end] = grammar
            while len(self._grammars) > self._max_grammars:
                self._grammars.popitem(last=False)
        return grammar

"""`Grammar`: what a `StructuredOutputs` compiles to, within limits that every machine reaches alike.

Imports llguidance. Made by `GrammarCompiler` on a tokenizer's thread; each sequence starts with a copy.
"""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits

from penstock.constraints.bounds import check_bounds
from penstock.constraints.matching import GrammarMatcher, GrammarVocabulary
from penstock.constraints.probes import StringTail, limits_of, words_of
from penstock.constraints.reasoning import Marker
from penstock.constraints.sources import grammar_text, refusal
from penstock.errors import GrammarError
from penstock.structured_outputs import StructuredOutputs

# Deterministic bounds on the work of compiling and of one mask, in llguidance's own units.
# Ambiguous grammars reach the library's own bound on items (50,000) only after a second per token. The values of a JSON
# schema are delimited, so its rows may be long and are not repeated: 2,000 items take 10 ms.
LIMITS = LLParserLimits(verbose_errors=False, step_max_items=20_000, max_items_in_row=500)
_SCHEMA_LIMITS = LLParserLimits(verbose_errors=False, step_max_items=20_000, max_items_in_row=2_000)
_REGEX_KEYWORDS = ('"pattern"', '"patternProperties"', '"format"')


class Grammar:
    """A compiled constraint, the start of any number of sequences. Raises `GrammarError` if it cannot be compiled."""

    def __init__(self, structured: StructuredOutputs, reasoning_end: str | None, vocabulary: GrammarVocabulary) -> None:
        check_bounds(structured)
        try:
            text = grammar_text(structured)
        except ValueError as error:
            raise error if isinstance(error, GrammarError) else refusal(structured, str(error)) from None
        limits = _SCHEMA_LIMITS if structured.kind == "json" else LIMITS
        self._template = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=limits)
        self._is_frugal = _is_frugal(structured)
        self._vocabulary = vocabulary
        self._template.compute_bitmask()  # some limits are reached only by the first mask
        if self._template.is_error():
            raise refusal(structured, self._template.get_error())
        if warnings := self._template.get_grammar_warnings():
            raise refusal(structured, "; ".join(warnings))
        self._tail = _tail_template(structured, text, vocabulary) if self._is_frugal else None
        self._marker: Marker | None = None
        if reasoning_end is not None:
            ids, words = vocabulary.eos_ids, vocabulary.num_words
            self._marker = Marker(reasoning_end, vocabulary.token_bytes, ids, words)

    @property
    def is_usable(self) -> bool:
        """Whether no copy has used up the limits of the lexer that all of them share."""
        trial = self._template.deep_copy()
        trial.compute_bitmask()
        return not trial.is_error()

    def start(self, *, ends_itself: bool) -> GrammarMatcher:
        """A constraint for a sequence without output."""
        copy, tail = self._template.deep_copy(), None if self._tail is None else self._tail.start()
        return GrammarMatcher(copy, self._vocabulary, self._marker, ends_itself, is_frugal=self._is_frugal, tail=tail)


def _is_frugal(structured: StructuredOutputs) -> bool:
    """Whether all terminals of a grammar are simple: those of a schema without regular expressions of its own."""
    if structured.kind not in ("json", "json_object") or structured.whitespace_pattern is not None:
        return False
    return not any(keyword in structured.source for keyword in _REGEX_KEYWORDS)


def _tail_template(structured: StructuredOutputs, text: str, vocabulary: GrammarVocabulary) -> StringTail | None:
    """The start of a schema's tails, for a schema that limits lengths of strings, but not of keys."""
    if '"maxLength"' not in structured.source or '"propertyNames"' in structured.source:
        return None
    grammar = LLMatcher(vocabulary.probes.tokenizer, text, log_level=0, limits=_SCHEMA_LIMITS)
    limits, words = limits_of(structured.source), words_of(structured.source)
    tail = StringTail(grammar, vocabulary.probes, limits, words)
    return tail if tail.is_usable else None

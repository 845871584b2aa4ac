"""`GrammarMatcher`: a `Constraint` over llguidance, and `GrammarVocabulary`, which fills masks for many of them.

Imports llguidance, an optional dependency, so this module is imported only where a grammar is compiled, by `grammar`.
`LLMatcher` never raises for bad input: it enters an error state, which every method here asks for.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from functools import cached_property

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from penstock.constraint import MaskRequest
from penstock.constraints.probes import ProbeVocabulary, StringTail
from penstock.constraints.reasoning import Marker, clear
from penstock.constraints.sources import shortened
from penstock.errors import GrammarError, described

_MAX_MASK_THREADS = 8
# Tokens that llguidance allows together where the grammar allows them all, and otherwise tries by their characters. Its
# own `general_slices` have strings of up to 10 and up to 30 characters; near the end of a string with `maxLength` most
# tokens are tried then.
_IN_STRING = r'[^"\\\x00-\x1F\x7F]'
SLICES = (
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_IN_STRING}{{1,{length}}}" for length in (3, 4, 5, 6, 7, 8, 9, 10, 14, 30)),
    f"{_IN_STRING}+",
)
# How many tokens may be accepted without a mask, which alone renews the fuel of the lexer. A character of a string of
# limited length costs 20 of the 200,000 units, where a regular expression may cost hundreds.
_MAX_UNMASKED = 32


class GrammarVocabulary:
    """A tokenizer as llguidance sees it. `eos_ids` are the tokens that may end a complete output.

    Making one takes a second for 150,000 tokens, half of it with the interpreter lock held. `tokenizer_json` is the
    Rust library's own format. `num_logits` is the width of the model's logits, which may exceed the tokenizer's size.
    """

    def __init__(self, tokenizer_json: str, num_tokens: int, num_logits: int, eos_ids: Collection[int]) -> None:
        size = max(num_tokens, num_logits)
        # A model without EOS: its last token stands in, and is in no mask.
        self.eos_ids = sorted(token for token in eos_ids if token < num_tokens) or [num_tokens - 1]
        bare = LLTokenizer(tokenizer_json, n_vocab=size, eos_token=self.eos_ids, slices=[])
        self.tokenizer = bare.with_slices(list(SLICES))
        self.num_words = -(-size // 32)
        self._size = size
        self._num_started = itertools.count()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token."""
        return [self.tokenizer.decode_bytes([token]) for token in range(self._size)]

    @cached_property
    def probes(self) -> ProbeVocabulary:
        """Made for the first schema with strings of limited length."""
        texts = [
            b"" if self.tokenizer.is_special_token(token) or text == b"<[%d]>" % token else text
            for token, text in enumerate(self.token_bytes)
        ]
        return ProbeVocabulary(texts, self.eos_ids, SLICES)

    def has_text(self, token: int) -> bool:
        """Whether a token is in the vocabulary and stands for any bytes; a mask allows no other."""
        return token < self._size and bool(self.tokenizer.decode_bytes([token]))

    def next_phase(self) -> int:
        """How many tokens earlier than others the next sequence to start has its masks.

        Sequences that start together would otherwise all need one in the same step.
        """
        return next(self._num_started) % (_MAX_UNMASKED // 2)

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(min(_MAX_MASK_THREADS, max(1, (os.cpu_count() or 2) // 2)))

    def fill(self, requests: SequenceOf[MaskRequest], bits: array[int]) -> Mapping[int, GrammarError]:
        """Write masks in parallel, without the interpreter lock. See `MaskFiller`."""
        single: list[tuple[LLMatcher, int]] = []
        drafted: list[tuple[LLMatcher, int, list[int]]] = []
        matchers = [_own(request) for request in requests]
        probed = self._fill_by_probes(matchers, requests, bits)
        for place, (matcher, request) in enumerate(zip(matchers, requests, strict=True)):
            if place in probed:
                continue
            if matcher.is_asleep:
                matcher.write_asleep(bits, request)
            elif request.draft:
                drafted.append((matcher.grammar, request.first, list(request.draft)))
            else:
                single.append((matcher.grammar, request.first))
        address, size = bits.buffer_info()
        buffer = (address, 4 * self.num_words, size // self.num_words)
        if single:
            self._executor.unsafe_compute_mask_ptr(single, *buffer)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *buffer)
        for place, (matcher, request) in enumerate(zip(matchers, requests, strict=True)):
            matcher.note_mask(is_probed=place in probed)
            if matcher.ends_itself and not matcher.is_asleep:
                for index in range(request.first, request.first + len(request.draft) + 1):
                    self._refuse_eos(bits, index * self.num_words)
        return {i: matcher.error() for i, matcher in enumerate(matchers) if matcher.grammar.is_error()}

    def _fill_by_probes(
        self, matchers: SequenceOf[GrammarMatcher], requests: SequenceOf[MaskRequest], bits: array[int]
    ) -> set[int]:
        """Write the masks of sequences within strings of limited length; returns their places."""
        tails = {
            place: matcher.tail
            for place, (matcher, request) in enumerate(zip(matchers, requests, strict=True))
            if matcher.tail is not None and not request.draft and matcher.takes_probes()
        }
        if not tails:
            return set()
        masks = dict(zip(tails, self.probes.fill(list(tails.values()), self._executor), strict=True))
        rows = np.frombuffer(bits, dtype=np.int32).reshape(-1, self.num_words)
        probed = {place: mask for place, mask in masks.items() if mask is not None}
        for place, mask in probed.items():
            rows[requests[place].first] = mask
        return set(probed)

    def _refuse_eos(self, bits: array[int], first_word: int) -> None:
        """Take EOS out of a mask that allows anything else; an output that is complete has no next token."""
        if not any(bits[first_word + (token >> 5)] >> (token & 31) & 1 for token in self.eos_ids):
            return
        words = bits[first_word : first_word + self.num_words]
        for token in self.eos_ids:
            clear(words, 0, token)
        if words.tobytes().strip(b"\0"):
            bits[first_word : first_word + self.num_words] = words


class GrammarMatcher:
    """The constraint of one sequence: asleep until its marker, if it has one, has appeared.

    `is_frugal`: it may go without a mask for a while. `tail`: it may have masks by probes.
    """

    def __init__(
        self,
        grammar: LLMatcher,
        vocabulary: GrammarVocabulary,
        marker: Marker | None,
        ends_itself: bool,
        *,
        is_frugal: bool = False,
        tail: StringTail | None = None,
    ) -> None:
        self.grammar = grammar
        self.tail = tail
        self.filler = vocabulary
        self.ends_itself = ends_itself
        self._phase = self._num_unmasked = vocabulary.next_phase()
        self._is_frugal = is_frugal
        self._marker = marker
        self._state = 0  # of the marker's search

    @property
    def is_asleep(self) -> bool:
        """Whether the reasoning has not ended, so that the grammar has not begun."""
        return self._marker is not None

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but EOS."""
        return self._marker is None and self.grammar.is_stopped() and not self.grammar.is_error()

    @property
    def prefers_candidates(self) -> bool:
        """Whether many tokens may follow, as within a string, so that a mask takes long and is hardly needed.

        Where one text has to follow, hardly any candidate may, and a mask takes little time.
        """
        is_due = self._is_frugal and self._marker is None and self._num_unmasked < _MAX_UNMASKED
        return is_due and not self.grammar.compute_ff_bytes()

    def takes_probes(self) -> bool:
        """Whether the next mask may be filled by probes, which do not renew the fuel of this grammar's own lexer."""
        return self.tail is not None and self._num_unmasked < _MAX_UNMASKED and self.tail.catch_up()

    def note_mask(self, *, is_probed: bool = False) -> None:
        """A mask was filled: the lexer has its fuel again, unless that was done by probes."""
        self._num_unmasked = self._num_unmasked + 1 if is_probed else self._phase

    def first_allowed(self, candidates: SequenceOf[int]) -> int | None:
        """The first candidate that may follow. See `Constraint`."""
        vocabulary = self.filler
        for token in candidates:
            is_end = token in vocabulary.eos_ids
            if is_end and self.ends_itself:
                continue  # a mask has it only where nothing else may follow
            # An id beyond the vocabulary would put the matcher into its error state.
            if (is_end or vocabulary.has_text(token)) and self.grammar.validate_tokens([token]):
                self._num_unmasked += 1
                return token
        return None

    def error(self) -> GrammarError:
        """The error that the grammar is in."""
        return GrammarError(f"the structured output could not be continued: {shortened(self.grammar.get_error())}")

    def advance(self, tokens: SequenceOf[int]) -> int:
        """Take in accepted tokens. See `Constraint`."""
        num_asleep = self._advance_asleep(tokens)
        awake = list(tokens[num_asleep:])
        if awake and awake[-1] in self.filler.eos_ids and not self.ends_itself:
            self._consume(awake[:-1])
            if not self.grammar.is_accepting():
                raise GrammarError("the structured output could not be continued: EOS came before its end")
            return len(tokens)
        return num_asleep + self._consume(awake)

    def trim(self, draft: SequenceOf[int]) -> tuple[int, ...]:
        """The draft up to the first token that may not follow, or that ends the reasoning. See `Constraint`."""
        if self._marker is not None:
            return tuple(draft[: self._num_asleep(self._marker, draft)])
        ends = [place for place, token in enumerate(draft) if token in self.filler.eos_ids]
        tokens = list(draft[: ends[0]] if ends else draft)
        count = self._advance_by(tokens)
        if count:
            self.grammar.rollback(count)
        return tuple(tokens[:count])

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        """The next tokens where only one text may follow. See `Constraint`."""
        if self._marker is not None or not self.grammar.compute_ff_bytes():
            return ()
        return self.trim(self.grammar.compute_ff_tokens()[:max_tokens])

    def write_asleep(self, bits: array[int], request: MaskRequest) -> None:
        """Write the masks of a sequence that reasons."""
        assert self._marker is not None
        state, num_words = self._state, self.filler.num_words
        for index, token in enumerate((*request.draft, None), request.first):
            bits[index * num_words : (index + 1) * num_words] = self._marker.mask(state)
            if token is not None:
                state = self._marker.after(state, token) or 0

    def _consume(self, tokens: list[int]) -> int:
        count = self._advance_by(tokens)
        if count < len(tokens) and not (self.ends_itself and self.is_complete):
            self.grammar.consume_tokens(tokens[count:])  # states the reason
            raise self.error()
        if self.tail is not None:
            self.tail.advance(tokens[:count])
        return count

    def _advance_by(self, tokens: list[int]) -> int:
        """Consume tokens up to the first that may not follow; returns how many.

        A mask renews the fuel of the lexer, which all copies of a grammar share and which never recovers from running
        out. So there is one before each token; before the first, the step's own.
        """
        for count, token in enumerate(tokens):
            if count:
                self.grammar.compute_bitmask()
            if not self.grammar.try_consume_tokens([token]):
                return count
        return len(tokens)

    def _advance_asleep(self, tokens: SequenceOf[int]) -> int:
        """Follow the marker; returns how many tokens belong to the reasoning, the marker's last one included."""
        for place, token in enumerate(tokens):
            if self._marker is None:
                return place
            state = self._marker.after(self._state, token)
            if state is None:
                raise GrammarError("a token ends the reasoning and holds more, or ends the text before its output")
            self._state = state
            if state == self._marker.end:
                self._marker = None
        return len(tokens)

    def _num_asleep(self, marker: Marker, draft: SequenceOf[int]) -> int:
        """How many draft tokens come before the marker is complete."""
        state: int | None = self._state
        for place, token in enumerate(draft):
            assert state is not None
            state = marker.after(state, token)
            if state is None or state == marker.end:
                return place
        return len(draft)


def _own(request: MaskRequest) -> GrammarMatcher:
    assert isinstance(request.constraint, GrammarMatcher)
    return request.constraint


def vocabulary_of(tokenizer: object, num_logits: int, eos_ids: Collection[int]) -> GrammarVocabulary:
    """The vocabulary of a fast tokenizer, which no other thread uses meanwhile. Raises `GrammarError`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise GrammarError(
            "structured outputs need a tokenizer of the Rust library (a 'fast' one), and this engine has "
            f"{'none' if tokenizer is None else type(tokenizer).__name__}: load the model with its tokenizer.json"
        )
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        text, num_tokens = backend.to_str(), backend.get_vocab_size(with_added_tokens=True)
        highest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        return GrammarVocabulary(text, max(num_tokens, highest + 1), num_logits, eos_ids)
    except ValueError as error:
        raise GrammarError(f"llguidance cannot use this tokenizer: {described(error)}") from error
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)

"""`TextStream`: tokens of one completion in, text to show out, with the stop string that ends it.

Detokenizes first, then looks for stop strings. Never ends a request, only reports the stop. Called by the
collector, and for beams by `BeamSearch`, on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple, Protocol

from penstock.engine.text.detokenizer import Detokenizer
from penstock.engine.text.reasoning import ReasoningEnd
from penstock.engine.text.stops import StopStrings
from penstock.errors import RequestError, described


class TextDelta(NamedTuple):
    """New text, the completed stop string or None, and the number of pushed tokens that count.

    `num_tokens` is all of them or, at a stop string, those up to and including the token that completed it.
    """

    text: str
    stop: str | None
    num_tokens: int


class Text(Protocol):
    """The interface that the collector uses."""

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add accepted tokens."""
        ...

    def finish(self) -> TextDelta:
        """The text still held back, when no token follows, and the stop string that it completes, if any."""
        ...


class NoText:
    """A completion without detokenizing."""

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """No text; all tokens count."""
        return TextDelta("", None, len(token_ids))

    def finish(self) -> TextDelta:
        """No text."""
        return TextDelta("", None, 0)


class TextStream:
    """The text of one completion.

    Stop strings are searched for in the text of token `min_tokens` + 1 and later tokens: no part of one may lie in text
    that became final with the first `min_tokens` tokens. A special token has the text that the detokenizer gives it; a
    stop token whose text must not be shown is not pushed. With `reasoning`, the search begins after it.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings | None = None,
        min_tokens: int = 0,
        reasoning: ReasoningEnd | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self._reasoning = reasoning  # until it has ended
        self._num_tokens = 0
        self._stop: str | None = None

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add tokens one by one, up to the one that completes a stop string; later tokens are dropped."""
        if self._stops is None:
            return TextDelta("".join(map(self._detokenizer.push, token_ids)), None, len(token_ids))
        texts: list[str] = []
        num_before = self._num_tokens
        for token_id in token_ids:
            if self._stop is not None:
                break
            self._num_tokens += 1
            texts.append(self._filter(self._detokenizer.push(token_id), self._stops, token_id))
        return TextDelta("".join(texts), self._stop, self._num_tokens - num_before)

    def copy(self) -> TextStream:
        """An independent stream in the same state."""
        clone = copy(self)
        clone._detokenizer, clone._stops = self._detokenizer.copy(), copy(self._stops)
        assert self._reasoning is None, "a beam search has no reasoning"
        return clone

    def finish(self) -> TextDelta:
        """The text still held back, when no token follows; it may complete a stop string, as in `push`."""
        text = self._detokenizer.flush()
        if self._stops is None:
            return TextDelta(text, None, 0)
        return TextDelta(self._filter(text, self._stops) + self._stops.flush(), self._stop, 0)

    def _filter(self, text: str, stops: StopStrings, token_id: int | None = None) -> str:
        num_reasoned = 0
        if self._reasoning is not None:
            end = self._reasoning.push(token_id, text)
            if end is None:
                return text
            num_reasoned, self._reasoning = end, None
        if self._num_tokens <= self._min_tokens:
            return text
        output, self._stop = stops.push(text[num_reasoned:])
        return text[:num_reasoned] + output


class BeamStopMatcher:
    """Finds stop strings in the text of a beam, for the beam search.

    The stream is never advanced: each further token is tried on a copy.
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def after(self, token: int) -> BeamStopMatcher | None:
        """The text with one more token; None if that completes a stop string. Raises `RequestError`."""
        stream = self._stream.copy()
        try:
            stop = stream.push([token]).stop
        except BaseException as error:  # a panic in the tokenizer library is not an `Exception`
            raise text_fault(error) from error
        return BeamStopMatcher(stream) if stop is None else None


def text_fault(error: BaseException) -> RequestError:
    """The error of a request whose tokens could not be decoded."""
    return RequestError(f"the output could not be turned into text: {described(error)}")

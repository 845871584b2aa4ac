"""What SGLang streams, added to the transcripts of a request.

Works on the objects of one request. Called by `SGLangEngine` for every chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from penstock.api.transcript import Transcript
from penstock.backends.hosted import HostedWork
from penstock.backends.request_params import as_sampled
from penstock.backends.sglang_params import changes_logits
from penstock.backends.streamed import StreamedRequest
from penstock.errors import (
    EngineOverloaded,
    ExecutionError,
    GrammarError,
    PenstockError,
    RequestAborted,
    RequestError,
)
from penstock.outputs import Logprob
from penstock.sampling import SamplingParams

Entry = tuple[float | None, int, str | None]  # a log probability, its token, and the token's text
_GRAMMAR_WORDS = ("grammar", "schema", "regex", "ebnf")


class Reason(TypedDict, total=False):
    """Why a stream ended: `type` is "stop", "length" or "abort". A refusal has an HTTP status."""

    type: str
    matched: int | list[int] | str
    message: str
    status_code: int | None


class Span(TypedDict):
    """A range of output tokens, and the version of the weights that they were sampled with."""

    version: str
    start: int
    end: int


class Meta(TypedDict, total=False):
    """What a chunk says beside its tokens."""

    finish_reason: Reason | None
    cached_tokens: int
    weight_version: str
    weight_versions: Sequence[Span]
    output_token_logprobs: Sequence[Entry]
    output_top_logprobs: Sequence[Sequence[Entry] | None]
    input_token_logprobs: Sequence[Entry]
    input_top_logprobs: Sequence[Sequence[Entry] | None]


class Chunk(TypedDict):
    """One item of a stream. All of it repeats what came before; `text` is None in an engine without a tokenizer."""

    text: str | None
    output_ids: Sequence[int]
    meta_info: Meta


class Stream:
    """One stream, which fills the transcripts of these completions: several if they are all alike."""

    def __init__(
        self, request: StreamedRequest[HostedWork], params: SamplingParams, completions: Iterable[int]
    ) -> None:
        self._request = request
        self._params = params
        self._completions = tuple(completions)
        self._num_tokens = 0
        self._num_characters = 0

    def add(self, chunk: Chunk) -> list[Transcript]:
        """The transcripts, with what is new in a chunk. Raises the error with which SGLang ended the stream."""
        meta, begin = chunk["meta_info"], self._num_tokens
        tokens = list(chunk["output_ids"][begin:])
        end = self._num_tokens = begin + len(tokens)
        text = (chunk["text"] or "")[self._num_characters :] if self._params.detokenize else ""
        self._num_characters += len(text)
        self._request.num_cached_tokens = meta.get("cached_tokens") or self._request.num_cached_tokens
        entries = [] if changes_logits(self._params) else list(meta.get("output_token_logprobs", ())[begin:end])
        logprobs = [logprob for logprob, _, _ in entries if logprob is not None]
        transcripts = [self._request.transcript(index) for index in self._completions]
        for transcript in transcripts:
            sampled = as_sampled(self._params, logprobs)
            transcript.add(text, tokens, logprobs, sampled, weight_versions=_versions(meta, begin, end))
            if self._params.logprobs is not None:
                tops = _tops(meta.get("output_top_logprobs"), begin, end)
                rows = [by_token(*pair, self._params.logprobs) for pair in zip(entries, tops, strict=False)]
                transcript.logprobs = [*(transcript.logprobs or []), *rows]
            self._finish(transcript, meta["finish_reason"])
        return transcripts

    def _finish(self, transcript: Transcript, reason: Reason | None) -> None:
        if reason is None:
            return
        if reason["type"] != "abort":
            matched = reason.get("matched")
            is_stop = isinstance(matched, str) or matched in (self._params.stop_token_ids or ())
            transcript.end("", reason["type"], matched if is_stop and not isinstance(matched, list) else None)
        elif (status := reason.get("status_code")) is not None:
            raise refusal(reason["message"], status)
        else:  # the reason is the request's error; without one, SGLang ended it of itself
            words = "SGLang ended the request, to pause or to load weights"
            self._request.error = self._request.error or RequestAborted(words)


def _versions(meta: Meta, begin: int, end: int) -> list[int]:
    """The version of the weights for every new token; SGLang has it as text, in spans if it changed."""
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": end}]
    last = spans[-1]
    return [
        int(next((span for span in spans if span["start"] <= place < span["end"]), last)["version"])
        for place in range(begin, end)
    ]


def _tops(rows: Sequence[Sequence[Entry] | None] | None, begin: int, end: int) -> list[Sequence[Entry]]:
    return [row or () for row in rows[begin:end]] if rows else [()] * (end - begin)


def by_token(entry: Entry, tops: Sequence[Entry], count: int) -> dict[int, Logprob]:
    """The token of a position, and the `count` likeliest (-1: all), whose ranks are 1, 2, ...; another's is 0."""
    likeliest = list(tops if count < 0 else tops[:count])
    ranks = {token: rank for rank, (_, token, _) in enumerate(tops, 1)}
    return {
        token: Logprob(logprob, ranks.get(token, 0), text)
        for logprob, token, text in (entry, *likeliest)
        if logprob is not None
    }


def prompt_logprobs(meta: Meta, count: int) -> list[dict[int, Logprob] | None]:
    """The entries of every token of a prompt; None for its first one."""
    entries = meta["input_token_logprobs"]
    tops = _tops(meta.get("input_top_logprobs"), 0, len(entries))
    return [by_token(*pair, count) or None for pair in zip(entries, tops, strict=True)]


@dataclass(frozen=True, slots=True)
class PromptEntries:
    """The entries of a prompt as `Scoring` takes them; there are none of places before the scored ones."""

    logprobs: list[float]
    token_ids: list[int]
    start_indices: list[int]
    end_indices: list[int]

    def __len__(self) -> int:
        return len(self.start_indices)

    @classmethod
    def of(cls, meta: Meta, prompt_len: int) -> PromptEntries:
        """Those of a prompt of `prompt_len` tokens, the last of which were asked for."""
        entries = meta["input_token_logprobs"]
        tops = _tops(meta.get("input_top_logprobs"), 0, len(entries))
        flat = cls([], [], [0] * (prompt_len - len(entries)), [0] * (prompt_len - len(entries)))
        for entry, likeliest in zip(entries, tops, strict=True):
            flat.start_indices.append(len(flat.logprobs))
            for logprob, token, _ in (entry, *likeliest):
                if logprob is not None:
                    flat.logprobs.append(logprob)
                    flat.token_ids.append(token)
            flat.end_indices.append(len(flat.logprobs))
        return flat


def refusal(words: str, status: int) -> PenstockError:
    """The error for a request that SGLang did not serve, with the HTTP status that it gives."""
    if status in (429, 503):
        return EngineOverloaded(f"SGLang is overloaded: {words}")
    if 400 <= status < 500:
        is_grammar = any(word in words.lower() for word in _GRAMMAR_WORDS)
        return (GrammarError if is_grammar else RequestError)(f"SGLang refused the request: {words}")
    return ExecutionError(f"SGLang failed: {words}")

"""What vLLM streams, added to the transcripts of a request.

Pure functions on the objects of one request. Called by `VLLMEngine` for every output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from penstock.api.transcript import Transcript
from penstock.backends.hosted import HostedWork
from penstock.backends.request_params import as_sampled
from penstock.backends.streamed import StreamedRequest
from penstock.errors import ExecutionError, RequestAborted
from penstock.outputs import Logprob
from penstock.sampling import SamplingParams


class Entry(Protocol):
    """vLLM's `Logprob`."""

    logprob: float
    rank: int | None
    decoded_token: str | None


class Choice(Protocol):
    """vLLM's `CompletionOutput`, of which everything but the index is what is new."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, Entry]] | None
    finish_reason: str | None
    stop_reason: str | int | None


class Output(Protocol):
    """vLLM's `RequestOutput`."""

    outputs: Sequence[Choice]
    prompt_logprobs: Sequence[Mapping[int, Entry] | None] | None
    num_cached_tokens: int | None


def add_output(
    request: StreamedRequest[HostedWork],
    params: SamplingParams,
    output: Output,
    weight_version: int,
    *,
    with_prompt: bool,
) -> list[Transcript]:
    """The transcripts to which an output added something. `with_prompt` keeps the log probabilities of the prompt.

    Raises `ExecutionError` for a completion that failed.
    """
    request.num_cached_tokens = output.num_cached_tokens or request.num_cached_tokens
    if with_prompt and output.prompt_logprobs and request.prompt_logprobs is None:
        request.prompt_logprobs = [None if entry is None else by_token(entry) for entry in output.prompt_logprobs]
    added = []
    for choice in output.outputs:
        alike = range(params.n) if params.num_sequences == 1 else range(choice.index, choice.index + 1)
        added += [_add(request, index, params, choice, weight_version) for index in alike]
    return added


def _add(
    request: StreamedRequest[HostedWork], index: int, params: SamplingParams, choice: Choice, weight_version: int
) -> Transcript:
    transcript = request.transcript(index)
    entries = choice.logprobs or ()
    if params.logprobs is not None:
        transcript.logprobs = [*(transcript.logprobs or []), *map(by_token, entries)]
    logprobs = [entry[token].logprob for token, entry in zip(choice.token_ids, entries, strict=False)]
    sampled = as_sampled(params, logprobs)
    transcript.add(choice.text, list(choice.token_ids), logprobs, sampled, weight_version)
    if choice.finish_reason == "error":
        raise ExecutionError("vLLM failed while it served the request: see its messages")
    if choice.finish_reason == "abort":  # the reason is the request's error; without one, vLLM ended it of itself
        request.error = request.error or RequestAborted("vLLM ended the request, to pause or to load weights")
    elif choice.finish_reason is not None:
        transcript.end("", choice.finish_reason, choice.stop_reason)
    return transcript


def by_token(entry: Mapping[int, Entry]) -> dict[int, Logprob]:
    """The entries of one position in the engine's own type."""
    return {token: Logprob(item.logprob, item.rank or 0, item.decoded_token) for token, item in entry.items()}

"""`TinkerEngine`: a sampling client of the Tinker SDK behind the `Engine` protocol.

The service samples whole completions. They are asked for piece by piece, so that a caller sees tokens before the end
and gets what there is of a request that it ends; the service's prefix cache has the earlier pieces. Owns no connection.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from typing import Any

from penstock.api.arguments import Arguments
from penstock.api.prompt import PromptInput
from penstock.api.transcript import Transcript
from penstock.backends.encoding import Encoder
from penstock.backends.services.sdk_holder import sdk_errors
from penstock.backends.streamed import StreamedEngine, StreamedRequest
from penstock.errors import PenstockError, RequestError
from penstock.generation import GenerationConfig, Params
from penstock.outputs import Logprob
from penstock.sampling import SamplingParams
from penstock.values import integer

PIECE = 16  # tokens
_SENT = {"n", "temperature", "top_p", "top_k", "seed", "max_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs"}
_WITHOUT_EFFECT = {
    *("output_kind", "speculation_length", "detokenize", "early_stopping", "length_penalty", "renormalize_logits"),
    *("skip_special_tokens",),  # of the text, which is decoded here
}
_DEFAULTS = SamplingParams()
Client = Any  # a `tinker.SamplingClient`
SDKParams = Any  # a `tinker.SamplingParams`


@dataclass(frozen=True, slots=True)
class Work:
    """What to sample: the prompt, its parameters, and the length of a completion."""

    prompt: PromptInput
    params: SamplingParams
    max_tokens: int


class TinkerEngine(StreamedEngine[Work]):
    """Generates with a `tinker.SamplingClient`, which samples from the base model or from an adapter.

    `tokenizer` encodes prompts and decodes outputs; without one, prompts are token ids and outputs have no text. A
    completion is sampled in pieces of `piece` tokens, but with stop strings, which could span two, at once. Priorities
    and namespaces are not sent. Logprobs are those of the model, without temperature.
    """

    def __init__(self, client: Client, tokenizer: object = None, *, piece: int = PIECE) -> None:
        super().__init__("penstock-tinker")
        self._client = client
        self._encoder = Encoder(tokenizer)
        self._has_text = tokenizer is not None
        self._piece = integer("piece", piece, 1, rule="an integer >= 1")

    def _prepare(self, arguments: Arguments) -> tuple[Work, int]:
        params = sampling_params_of(arguments.params)
        if params.max_tokens is None:
            raise RequestError("max_tokens must be set: the service does not tell how long a completion may be")
        return Work(arguments.prompt, params, params.max_tokens), params.n

    async def _open(self) -> None:
        """The client was connected when it was made."""

    async def _close(self) -> None:
        self._encoder.close()

    async def _stream(self, request: StreamedRequest[Work]) -> None:
        channel, work = request.channel, request.work
        channel.prompt, ids = await self._encoder.encode(work.prompt)
        channel.prompt_token_ids = ids
        async with asyncio.TaskGroup() as group:
            for index in range(request.num_completions):
                group.create_task(self._complete(request, ids, index))

    async def _complete(self, request: StreamedRequest[Work], ids: list[int], index: int) -> None:
        """Sample one completion to its end."""
        work, transcript = request.work, request.transcript(index)
        if work.params.logprobs is not None:
            transcript.logprobs = []
        piece = work.max_tokens if work.params.stop else self._piece
        text, reason = "", None
        while reason is None:
            num_sampled = len(transcript.token_ids)
            length = min(piece, work.max_tokens - num_sampled)
            sequence = await self._sample(work, [*ids, *transcript.token_ids], index, num_sampled, length)
            num_new = len(sequence.tokens)  # fewer than asked for where the context is full
            is_last = sequence.stop_reason == "stop" or num_new < length or num_sampled + num_new >= work.max_tokens
            reason = sequence.stop_reason if is_last else None
            _add(transcript, sequence)
            text, added = await self._text_added(work.params, transcript, text, is_last=is_last)
            transcript.texts.append(added)
            if reason is not None:
                transcript.end("", reason)
            self._publish(request, [transcript])

    async def _sample(self, work: Work, ids: list[int], index: int, num_sampled: int, length: int) -> Any:
        """The next piece of a completion, a `SampledSequence`."""
        from tinker import types

        params = _sdk_params(work.params, length, index, num_sampled)
        with sdk_errors("Tinker"):
            response = await self._client.sample(
                types.ModelInput.from_ints(ids), 1, params, topk_sample_logprobs=work.params.logprobs or 0
            )
        return response.sequences[0]

    async def _text_added(
        self, params: SamplingParams, transcript: Transcript, prefix: str, *, is_last: bool
    ) -> tuple[str, str]:
        """The text so far, without a character that may not be complete, and what of it is new."""
        if not (self._has_text and params.detokenize):
            return "", ""
        text = await self._encoder.decode(transcript.token_ids, params.skip_special_tokens)
        if not is_last:
            text = text.rstrip("\ufffd")
        return (text, text[len(prefix) :]) if len(text) > len(prefix) else (prefix, "")

    def _error_of(self, error: BaseException) -> PenstockError:
        if isinstance(error, BaseExceptionGroup):
            return self._error_of(error.exceptions[0])
        try:
            with sdk_errors("Tinker"):
                raise error
        except PenstockError as known:
            return known


def sampling_params_of(params: Params) -> SamplingParams:
    """The parameters. Raises `RequestError` for what the service does not have."""
    if params is None:
        return SamplingParams(max_tokens=None)
    if isinstance(params, GenerationConfig):
        params = params.sampling_params()
    for field in fields(params):
        is_default = getattr(params, field.name) == getattr(_DEFAULTS, field.name)
        if field.init and field.name not in _SENT | _WITHOUT_EFFECT and not is_default:
            raise RequestError(f"{field.name} cannot be sent to a Tinker service: leave it out")
    if params.stop and params.stop_token_ids:
        raise RequestError("a Tinker service takes stop strings or stop ids: leave stop or stop_token_ids out")
    return params


def _sdk_params(params: SamplingParams, length: int, index: int, num_sampled: int) -> SDKParams:
    """The SDK's parameters of one piece, with a seed of its own."""
    from tinker import types

    stop: list[Any] = [*(params.stop or ()), *(params.stop_token_ids or ())]
    seed = None if params.seed is None else hash((params.seed, index, num_sampled)) % 2**31
    return types.SamplingParams(
        max_tokens=length,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k or -1,
        seed=seed,
        stop=stop if stop or params.ignore_eos else None,
    )


def _add(transcript: Transcript, sequence: Any) -> None:
    logprobs = sequence.logprobs or [0.0] * len(sequence.tokens)
    transcript.add("", sequence.tokens, logprobs, logprobs)
    if transcript.logprobs is None:
        return
    tops = sequence.topk_logprobs or [None] * len(sequence.tokens)
    for token, logprob, top in zip(sequence.tokens, logprobs, tops, strict=True):
        entries = {candidate: Logprob(value, rank) for rank, (candidate, value) in enumerate(top or (), 1)}
        transcript.logprobs.append({**entries, token: entries.get(token, Logprob(logprob, len(entries) + 1))})

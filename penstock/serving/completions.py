"""`/v1/completions`: text completions of one or several prompts, streamed or at once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from penstock.api.handle import RequestHandle
from penstock.outputs import CompletionOutput, Delta, RequestOutput
from penstock.serving.body import read_model
from penstock.serving.chunks import Chunks
from penstock.serving.completion_request import CompletionRequest
from penstock.serving.endpoint import Exchange
from penstock.serving.generation import Generation, Usage, usage_of
from penstock.serving.json_response import json_response
from penstock.serving.logprobs import CompletionLogprobs
from penstock.serving.server import Server
from penstock.serving.usage import usage_json

_REGULAR = ("stop", "length")


async def completions(server: Server, request: Request) -> Response:
    """Complete texts."""
    exchange = Exchange.begin(server, request, "cmpl-")
    body = await read_model(request, CompletionRequest, server.settings.max_body_bytes)
    model, prompts = exchange.check_model(body.model), body.prompts(server.settings)
    params = body.sampling(server.settings, len(prompts), server.defaults)
    options = body.options(exchange.call.client)
    generation = await exchange.submit(prompts, params, options)
    echoes = [await _echo_of(server, handle) for handle in generation.handles] if body.echo else []
    answer = CompletionAnswer(body, exchange.id, model, echoes)
    if body.stream:
        return exchange.stream(generation, answer.frames(generation))
    return json_response(answer.whole(await exchange.outputs(generation)))


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt as text, and the text of its first token, which has no log probability that would name it."""

    text: str = ""
    first_text: str = ""


async def _echo_of(server: Server, handle: RequestHandle) -> _Echo:
    """Of a prompt of token ids the text of all of them; what the tokenizer put before a text is not echoed."""
    ids, text = handle.prompt_token_ids, handle.prompt
    first_text = await server.text_of(ids[:1], skip_special_tokens=text is not None)
    return _Echo(await server.text_of(ids, skip_special_tokens=False) if text is None else text, first_text)


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """Builds the objects of one answer. Choices are numbered through all prompts."""

    body: CompletionRequest
    id: str
    model: str
    echoes: list[_Echo]  # of each prompt, if they are asked for
    logprobs: dict[int, CompletionLogprobs] = field(default_factory=dict)  # of streamed choices
    begun: set[int] = field(default_factory=set)  # streamed choices whose prompt was named

    def whole(self, outputs: list[RequestOutput]) -> dict[str, object]:
        """The answer at once."""
        choices = [self._choice(number, output, out) for number, output in enumerate(outputs) for out in output.outputs]
        usage = usage_of(outputs)
        if self.body.max_tokens == 0:
            usage = Usage(usage.prompt_tokens, 0, usage.cached_tokens)
        return self._head() | {"choices": choices, "usage": usage_json(usage)}

    def frames(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as server-sent events, of which the first are the echoes."""
        n, handles = self.body.n or 1, generation.handles
        echoes = [_text_choice(index, self.echoes[index // n].text) for index in range(len(self.echoes) * n)]
        hides_output = self.body.max_tokens == 0
        chunks = Chunks(self._head(), self.body.stream_options, generation, hides_output=hides_output)

        def choices_of(number: int, delta: Delta) -> list[dict[str, object]]:
            index = number * n + delta.index
            choices = self._delta_choices(index, delta)
            if self.body.return_token_ids and choices and index not in self.begun:
                self.begun.add(index)
                choices[0]["prompt_token_ids"] = handles[number].prompt_token_ids
            return choices

        return chunks.frames(echoes, choices_of)

    def _choice(self, number: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, object]:
        text, ids, entries = completion.text, completion.token_ids, list(completion.logprobs or ())
        echo = self.echoes[number] if self.body.echo else _Echo()
        if self.body.max_tokens == 0:
            text, ids, entries = "", [], []
        logprobs = None
        if self.body.logprobs is not None:
            builder, all_ids, all_entries = self._logprobs(self.body.logprobs), ids, [*entries]
            if self.body.echo and output.prompt_logprobs is not None:
                all_ids, all_entries = output.prompt_token_ids + ids, [*output.prompt_logprobs, *entries]  # type: ignore[list-item]
            logprobs = builder.add(all_ids, all_entries, echo.first_text)
        choice: dict[str, object] = {
            "index": number * (self.body.n or 1) + completion.index,
            "text": echo.text + text,
            "logprobs": logprobs,
            "finish_reason": "length" if self.body.max_tokens == 0 else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.body.return_token_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": output.prompt_token_ids}
            choice |= {"weight_versions": completion.weight_versions[: len(ids)]}
        return choice

    def _delta_choices(self, index: int, delta: Delta) -> list[dict[str, object]]:
        """The choice that one delta of the engine becomes, if it says anything."""
        reason = delta.finish_reason if delta.finish_reason in _REGULAR else None
        if not (delta.text or delta.token_ids or reason):
            return []
        if self.body.max_tokens == 0:
            return [_text_choice(index, "", finish_reason="length")] if reason else []
        logprobs = None
        if self.body.logprobs is not None and delta.token_ids:
            builder = self.logprobs.setdefault(index, self._logprobs(self.body.logprobs))
            logprobs = builder.add(delta.token_ids, delta.logprobs)
        choice = _text_choice(index, delta.text, logprobs, reason)
        choice["stop_reason"] = delta.stop_reason if reason else None
        if self.body.return_token_ids:
            choice |= {"token_ids": delta.token_ids, "weight_versions": delta.weight_versions}
        return [choice]

    def _logprobs(self, top: int) -> CompletionLogprobs:
        return CompletionLogprobs(top, as_ids=bool(self.body.return_tokens_as_token_ids))

    def _head(self) -> dict[str, object]:
        return {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": self.model}


def _text_choice(
    index: int, text: str, logprobs: Mapping[str, object] | None = None, finish_reason: str | None = None
) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

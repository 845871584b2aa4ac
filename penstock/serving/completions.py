"""`/v1/completions`: text completions of one or several prompts, streamed or at once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

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
    answer = CompletionAnswer(body, exchange.id, model)
    if body.stream:
        return exchange.stream(generation, answer.frames(generation))
    outputs = await exchange.outputs(generation)
    if body.echo and body.logprobs is not None:
        answer.first_texts.extend([await server.text_of(output.prompt_token_ids[:1]) for output in outputs])
    return json_response(answer.whole(outputs))


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """Builds the objects of one answer. Choices are numbered through all prompts."""

    body: CompletionRequest
    id: str
    model: str
    logprobs: dict[int, CompletionLogprobs] = field(default_factory=dict)  # of streamed choices
    first_texts: list[str] = field(default_factory=list)  # of the prompts' first tokens, which have no log probability

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
        echoes = [_text_choice(index, handles[index // n].prompt or "") for index in range(len(handles) * n)]
        chunks = Chunks(self._head(), self.body.stream_options, generation)
        return chunks.frames(
            echoes if self.body.echo else (),
            lambda number, delta: self._delta_choices(number * n + delta.index, delta),
        )

    def _choice(self, number: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, object]:
        text, ids, entries = completion.text, completion.token_ids, list(completion.logprobs or ())
        if self.body.max_tokens == 0:
            text, ids, entries = "", [], []
        logprobs = None
        if self.body.logprobs is not None:
            builder, all_ids, all_entries = self._logprobs(self.body.logprobs), ids, [*entries]
            if self.body.echo and output.prompt_logprobs is not None:
                all_ids, all_entries = output.prompt_token_ids + ids, [*output.prompt_logprobs, *entries]  # type: ignore[list-item]
            logprobs = builder.add(all_ids, all_entries, self.first_texts[number] if self.body.echo else "")
        choice: dict[str, object] = {
            "index": number * (self.body.n or 1) + completion.index,
            "text": (output.prompt or "") + text if self.body.echo else text,
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
            choice["token_ids"] = delta.token_ids
        return [choice]

    def _logprobs(self, top: int) -> CompletionLogprobs:
        return CompletionLogprobs(top, as_ids=bool(self.body.return_tokens_as_token_ids))

    def _head(self) -> dict[str, object]:
        return {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": self.model}


def _text_choice(
    index: int, text: str, logprobs: Mapping[str, object] | None = None, finish_reason: str | None = None
) -> dict[str, object]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

"""`/v1/chat/completions`: chat completions, streamed or at once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from penstock.outputs import CompletionOutput, Delta, RequestOutput
from penstock.serving.body import read_model
from penstock.serving.chat_request import ChatRequest
from penstock.serving.chunks import Chunks
from penstock.serving.endpoint import Exchange, json_answer
from penstock.serving.generation import Generation, usage_of
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.server import Server
from penstock.serving.usage import usage_json

_REGULAR = ("stop", "length")


async def chat_completions(server: Server, request: Request) -> Response:
    """Answer a chat."""
    exchange = Exchange.begin(server, request, "chatcmpl-")
    body = await read_model(request, ChatRequest, server.settings.max_body_bytes)
    model = server.check_model(body.model)
    body.check(server.settings)
    params, options = body.sampling(server.settings), body.options(exchange.call.client)
    generation = await exchange.submit([body.prompt()], params, options)
    answer = ChatAnswer(body, exchange.id, model)
    if body.stream:
        return exchange.stream(generation, answer.frames(generation))
    (output,) = await exchange.outputs(generation)
    return json_answer(answer.whole(output))


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """Builds the objects of one answer."""

    body: ChatRequest
    id: str
    model: str

    def whole(self, output: RequestOutput) -> dict[str, object]:
        """The answer at once."""
        choices = [self._choice(completion) for completion in output.outputs]
        answer = self._head("chat.completion") | {"choices": choices, "usage": usage_json(usage_of([output]))}
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    def frames(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        head = self._head("chat.completion.chunk")
        return Chunks(head, self.body.stream_options, generation).frames(self._streamed(generation))

    async def _streamed(self, generation: Generation) -> AsyncIterator[dict[str, object]]:
        """The choices of a stream, whose first ones say whose turn it is."""
        for index in range(self.body.n or 1):
            yield _delta_choice(index, {"role": "assistant", "content": ""})
        async for _, delta in generation.deltas():
            for choice in self._delta_choices(delta):
                yield choice

    def _delta_choices(self, delta: Delta) -> list[dict[str, object]]:
        """The choices that one delta of the engine becomes."""
        choices = []
        logprobs = self._logprobs(delta.token_ids, delta.logprobs) if self.body.logprobs and delta.token_ids else None
        if delta.text or logprobs is not None or (self.body.return_token_ids and delta.token_ids):
            choice = _delta_choice(delta.index, {"content": delta.text}, logprobs)
            if self.body.return_token_ids:
                choice["token_ids"] = delta.token_ids
            choices.append(choice)
        if delta.finish_reason in _REGULAR:
            choice = _delta_choice(delta.index, {}, None, delta.finish_reason)
            choice["stop_reason"] = delta.stop_reason
            choices.append(choice)
        return choices

    def _choice(self, completion: CompletionOutput) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": completion.text, "refusal": None}
        choice: dict[str, object] = {
            "index": completion.index,
            "message": message,
            "logprobs": None
            if completion.logprobs is None
            else self._logprobs(completion.token_ids, completion.logprobs),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _logprobs(self, ids: object, entries: object) -> dict[str, object]:
        return chat_logprobs(ids, entries, self.body.top_logprobs or 0)  # type: ignore[arg-type]

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}


def _delta_choice(
    index: int, delta: Mapping[str, object], logprobs: object = None, finish_reason: str | None = None
) -> dict[str, object]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

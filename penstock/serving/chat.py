"""`/v1/chat/completions`: chat completions, streamed or at once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from penstock.outputs import CompletionOutput, Delta, Logprob, RequestOutput
from penstock.serving.body import read_model
from penstock.serving.chat_message import delta_of, message_of
from penstock.serving.chat_request import ChatRequest
from penstock.serving.chat_task import REGULAR_ENDS, ChatTask, OutputReader
from penstock.serving.chunks import Chunks
from penstock.serving.endpoint import Exchange
from penstock.serving.generation import Generation, usage_of
from penstock.serving.json_response import json_response
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.server import Server
from penstock.serving.usage import usage_json


async def chat_completions(server: Server, request: Request) -> Response:
    """Answer a chat."""
    exchange = Exchange.begin(server, request, "chatcmpl-")
    body = await read_model(request, ChatRequest, server.settings.max_body_bytes)
    model = exchange.check_model(body.model)
    body.check(server.settings)
    task, options = body.task(server.settings, server.formats, server.defaults), body.options(exchange.call.client)
    generation = await exchange.submit_chat(task, options)
    answer = ChatAnswer(server, body, exchange.id, model, task)
    if body.stream:
        return exchange.stream(generation, answer.frames(generation))
    (output,) = await exchange.outputs(generation)
    return json_response(await answer.whole(output))


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """Builds the objects of one answer."""

    server: Server
    body: ChatRequest
    id: str
    model: str
    task: ChatTask

    async def whole(self, output: RequestOutput) -> dict[str, object]:
        """The answer at once."""
        readers = [self.task.reader(output.prompt or "") for _ in output.outputs]
        choices = [self._choice(*pair) for pair in zip(output.outputs, readers, strict=True)]
        usage = replace(usage_of([output]), reasoning_tokens=await self._reasoning_tokens(readers))
        answer = self._head("chat.completion") | {"choices": choices, "usage": usage_json(usage)}
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    def frames(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        head = self._head("chat.completion.chunk")
        readers = [self.task.reader(generation.handles[0].prompt or "") for _ in range(self.body.n or 1)]
        chunks = Chunks(head, self.body.stream_options, generation, lambda: self._reasoning_tokens(readers))
        # The first choices say whose turn it is.
        first = [_delta_choice(index, {"role": "assistant", "content": ""}) for index in range(len(readers))]
        prompt_ids = {"prompt_token_ids": generation.handles[0].prompt_token_ids} if self.body.return_token_ids else {}
        return chunks.frames(first, lambda _, delta: self._delta_choices(delta, readers[delta.index]), **prompt_ids)

    async def _reasoning_tokens(self, readers: Sequence[OutputReader]) -> int:
        return sum([await self.server.num_tokens(reader.reasoning) for reader in readers])

    def _delta_choices(self, delta: Delta, reader: OutputReader) -> list[dict[str, object]]:
        """The choices that one delta of the engine becomes. What belongs to tokens stands in the first."""
        has_logprobs, has_ids = bool(self.body.logprobs and delta.token_ids), self.body.return_token_ids
        parts = [delta_of(piece) for piece in reader.read(delta)]
        if not parts and (has_logprobs or (has_ids and delta.token_ids)):
            parts = [{"content": ""}]
        choices = [_delta_choice(delta.index, part) for part in parts]
        if has_logprobs:
            choices[0]["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs)
        if has_ids and choices:
            choices[0] |= {"token_ids": delta.token_ids, "weight_versions": delta.weight_versions}
        if delta.finish_reason in REGULAR_ENDS:
            choices.append(_delta_choice(delta.index, {}, reader.finish_reason(delta.finish_reason, delta.stop_reason)))
            choices[-1]["stop_reason"] = delta.stop_reason
        return choices

    def _choice(self, completion: CompletionOutput, reader: OutputReader) -> dict[str, object]:
        logprobs = None
        if completion.logprobs is not None:
            logprobs = self._logprobs(completion.token_ids, completion.logprobs)
        message = message_of(reader.read_whole(completion))
        choice: dict[str, object] = {
            "index": completion.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": reader.finish_reason(completion.finish_reason, completion.stop_reason),
            "stop_reason": completion.stop_reason,
        }
        if self.body.return_token_ids:
            choice |= {"token_ids": completion.token_ids, "weight_versions": completion.weight_versions}
        return choice

    def _logprobs(self, ids: Sequence[int], entries: Sequence[Mapping[int, Logprob]]) -> dict[str, object]:
        return chat_logprobs(ids, entries, self.body.top_logprobs or 0, bool(self.body.return_tokens_as_token_ids))

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}


def _delta_choice(index: int, delta: Mapping[str, object], finish_reason: str | None = None) -> dict[str, object]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

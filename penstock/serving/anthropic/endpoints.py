"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from penstock.api.protocols import Tokenizing
from penstock.outputs import RequestOutput
from penstock.sampling import SamplingParams
from penstock.serving.anthropic.answer import ContentBlocks, Event, stop_reason, usage_json
from penstock.serving.anthropic.envelope import failure_frame
from penstock.serving.anthropic.request import CountTokensRequest, MessagesRequest
from penstock.serving.body import read_model
from penstock.serving.chat_task import REGULAR_ENDS, ChatTask, OutputReader
from penstock.serving.endpoint import Exchange
from penstock.serving.errors import HttpError
from penstock.serving.generation import Generation, Usage, usage_of
from penstock.serving.json_response import json_response
from penstock.serving.server import Server
from penstock.serving.sse import named_frame

PING: Event = {"type": "ping"}


async def create_message(server: Server, request: Request) -> Response:
    """Answer a conversation."""
    exchange = Exchange.begin(server, request, "msg_")
    body = await read_model(request, MessagesRequest, server.settings.max_body_bytes)
    model = exchange.check_model(body.model)
    task = body.task(server.settings, server.formats, server.defaults)
    generation = await exchange.submit_chat(task, body.options(exchange.call.client))
    answer = MessageAnswer(server, body, exchange.id, model, task)
    if body.stream:
        frames = answer.frames(generation)
        return exchange.stream(generation, frames, failure_frame=failure_frame, done=b"", ping=_frame(PING))
    (output,) = await exchange.outputs(generation)
    return json_response(await answer.whole(output))


async def count_tokens(server: Server, request: Request) -> Response:
    """The number of tokens of a conversation, as a message would have it."""
    body = await read_model(request, CountTokensRequest, server.settings.max_body_bytes)
    server.check_model(body.model)
    if not isinstance(server.engine, Tokenizing):
        raise HttpError(501, "this engine does not tokenize")
    task = body.chat_task(server.settings, server.formats, SamplingParams())
    return json_response({"input_tokens": len(await server.engine.tokenize(task.prompt))})


@dataclass(frozen=True, slots=True)
class MessageAnswer:
    """Builds the objects of one answer."""

    server: Server
    body: MessagesRequest
    id: str
    model: str
    task: ChatTask

    async def whole(self, output: RequestOutput) -> Event:
        """The answer at once."""
        completion, blocks, reader = output.outputs[0], self._blocks(), self.task.reader(output.prompt or "")
        for piece in reader.read_whole(completion):
            blocks.add(piece)
        usage = await self._counted(usage_of([output]), reader)
        end = self._end(completion.finish_reason, completion.stop_reason, usage, reader)
        return {**self._head(), "content": blocks.content(), **end, "usage": usage_json(usage)}

    async def frames(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        blocks, reader = self._blocks(), self.task.reader(generation.handles[0].prompt or "")
        message: Event = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
        yield _frame({"type": "message_start", "message": {**message, "usage": usage_json(generation.usage())}})
        yield _frame(PING)
        finish_reason, stop = None, None
        async for _, delta in generation.deltas():
            for piece in reader.read(delta):
                for event in blocks.add(piece):
                    yield _frame(event)
            if delta.finish_reason in REGULAR_ENDS:
                finish_reason, stop = delta.finish_reason, delta.stop_reason
        for event in blocks.close():
            yield _frame(event)
        usage = await self._counted(await generation.final_usage(), reader)
        end = self._end(finish_reason, stop, usage, reader)
        yield _frame({"type": "message_delta", "delta": end, "usage": usage_json(usage)})
        yield _frame({"type": "message_stop"})

    def _end(self, finish_reason: str | None, stop: str | int | None, usage: Usage, reader: OutputReader) -> Event:
        is_at_limit = usage.completion_tokens >= self.body.max_tokens
        reason = stop_reason(finish_reason, stop, reader.has_calls(stop), is_at_limit)
        return {"stop_reason": reason, "stop_sequence": stop if reason == "stop_sequence" else None}

    async def _counted(self, usage: Usage, reader: OutputReader) -> Usage:
        return replace(usage, reasoning_tokens=await self.server.num_tokens(reader.reasoning))

    def _blocks(self) -> ContentBlocks:
        thinking = self.body.thinking
        if thinking is not None and thinking.type == "disabled":
            return ContentBlocks("dropped")
        return ContentBlocks("omitted" if thinking is not None and thinking.display == "omitted" else "shown")

    def _head(self) -> Event:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model}


def _frame(event: Event) -> bytes:
    return named_frame(str(event["type"]), event)

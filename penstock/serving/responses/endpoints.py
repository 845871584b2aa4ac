"""`/v1/responses`: create, retrieve, cancel and delete responses, list the items of their input, count its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from penstock.api.protocols import Tokenizing
from penstock.outputs import RequestOutput
from penstock.sampling import SamplingParams
from penstock.serving.body import read_model
from penstock.serving.chat_task import OutputReader
from penstock.serving.endpoint import Exchange
from penstock.serving.errors import Failure, HttpError, invalid
from penstock.serving.gate import call_of
from penstock.serving.generation import Generation, Usage, usage_of
from penstock.serving.json_response import json_response
from penstock.serving.responses.answer import ResponseAnswer
from penstock.serving.responses.items import Item
from penstock.serving.responses.request import InputTokensRequest, ResponsesRequest
from penstock.serving.responses.store import StoredResponse
from penstock.serving.responses.truncation import truncated
from penstock.serving.server import Server

_MAX_PAGE = 100
_PAGE = 20


async def create_response(server: Server, request: Request) -> Response:
    """Answer a conversation."""
    exchange = Exchange.begin(server, request, "resp_")
    body = await read_model(request, ResponsesRequest, server.settings.max_body_bytes)
    model = exchange.check_model(body.model)
    items = body.items()
    conversation = await _conversation(server, request, body, items)
    task = body.task(conversation, server.settings, server.formats, server.defaults)
    generation = await exchange.submit_chat(task, body.options(exchange.call.client))
    answer = ResponseAnswer(body, task, exchange.id, model)
    work = _Creation(exchange, answer, items, task.reader(generation.handles[0].prompt or ""))
    if body.stream:
        return exchange.stream(generation, work.frames(generation), failure_frame=work.failure_frames, done=b"")
    (output,) = await exchange.outputs(generation)
    return json_response(await work.whole(output))


@dataclass(frozen=True, slots=True)
class _Creation:
    """A response that is being created."""

    exchange: Exchange
    answer: ResponseAnswer
    input_items: list[Item]
    reader: OutputReader

    async def whole(self, output: RequestOutput) -> Mapping[str, object]:
        """The response at once."""
        self.answer.read(output.outputs[0], self.reader)
        await self._count(usage_of([output]))
        self._keep(self.exchange.server.responses.put)
        return self.answer.value()

    async def frames(self, generation: Generation) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        answer, store = self.answer, self.exchange.server.responses
        self._keep(store.begin)
        try:
            yield answer.frame(answer.event("response.created"))
            yield answer.frame(answer.event("response.in_progress"))
            async for _, delta in generation.deltas():
                for event in answer.read(delta, self.reader):
                    yield answer.frame(event)
            await self._count(await generation.final_usage())
        except (GeneratorExit, asyncio.CancelledError):  # the client has left
            answer.status = "cancelled"
            self._keep(store.end)
            raise
        self._keep(store.end)
        yield answer.frame(answer.event(f"response.{answer.status}"))

    def failure_frames(self, failure: Failure) -> bytes:
        """The last events of a stream that fails."""
        events = self.answer.fail(failure)
        self._keep(self.exchange.server.responses.end)
        return b"".join(map(self.answer.frame, events))

    async def _count(self, usage: Usage) -> None:
        num_reasoning = await self.exchange.server.num_tokens(self.reader.reasoning)
        self.answer.usage = replace(usage, reasoning_tokens=min(num_reasoning, usage.completion_tokens))

    def _keep(self, store: Callable[[str, str, StoredResponse], None]) -> None:
        """Store the response as it is now."""
        body, exchange = self.answer.body, self.exchange
        if body.store is not False:
            stored = StoredResponse.of(self.answer.value(), self.input_items, body.previous_response_id)
            store(exchange.call.client.namespace, exchange.id, stored)


async def retrieve_response(server: Server, request: Request) -> Response:
    """A stored response."""
    if request.query_params.get("stream") == "true":
        raise invalid("a stored response cannot be streamed: leave stream out", "stream")
    return json_response(_stored(server, request).response())


async def delete_response(server: Server, request: Request) -> Response:
    """Forget a response."""
    _stored(server, request)
    response_id = str(request.path_params["response_id"])
    server.responses.delete(_namespace(request), response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(server: Server, request: Request) -> Response:
    """End a response that is being streamed; one that has ended stays as it is."""
    stored = _stored(server, request)
    response = stored.response()
    if response["status"] == "in_progress":
        server.lifecycle.abort(str(response["id"]))
        response["status"] = "cancelled"
    return json_response(response)


async def list_input_items(server: Server, request: Request) -> Response:
    """The items of a response's own input, the last one first unless the query asks for `order=asc`."""
    items, query = _stored(server, request).items(), request.query_params
    if query.get("order", "desc") not in ("asc", "desc"):
        raise invalid("order is asc or desc", "order")
    if query.get("order", "desc") == "desc":
        items.reverse()
    limit = query.get("limit", str(_PAGE))
    if not limit.isdecimal() or len(limit) > 3 or not 1 <= int(limit) <= _MAX_PAGE:
        raise invalid(f"limit is a number from 1 to {_MAX_PAGE}", "limit")
    ids = [item["id"] for item in items]
    start = 0
    if (after := query.get("after")) is not None:
        if after not in ids:
            raise invalid("after is not the id of an item", "after")
        start = ids.index(after) + 1
    page = items[start : start + int(limit)]
    bounds = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
    return json_response({"object": "list", "data": page, "has_more": start + len(page) < len(items), **bounds})


async def count_input_tokens(server: Server, request: Request) -> Response:
    """The number of tokens of a conversation, as a response would have it."""
    body = await read_model(request, InputTokensRequest, server.settings.max_body_bytes)
    server.check_model(body.model)
    conversation = await _conversation(server, request, body, body.items())
    num_tokens = await _num_tokens(server, body, conversation)
    return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})


async def _conversation(
    server: Server, request: Request, body: InputTokensRequest, items: Sequence[Item]
) -> Sequence[Item]:
    """The items of the whole conversation; if the client wishes, of as much of it as fits."""
    conversation = [*_history(server, request, body), *items]
    limit = server.max_model_len
    if body.truncation != "auto" or limit is None:
        return conversation
    room = min(body.num_reserved, limit // 2)
    return await truncated(conversation, limit - room, lambda part: _num_tokens(server, body, part))


async def _num_tokens(server: Server, body: InputTokensRequest, items: Sequence[Item]) -> int:
    if not isinstance(server.engine, Tokenizing):
        raise HttpError(501, "this engine does not tokenize")
    task = body.chat_task(items, server.settings, server.formats, SamplingParams())
    return len(await server.engine.tokenize(task.prompt))


def _history(server: Server, request: Request, body: InputTokensRequest) -> list[Item]:
    """The items of the responses that this one continues."""
    if body.previous_response_id is None:
        return []
    max_bytes = server.settings.max_body_bytes
    previous = server.responses.get(_namespace(request), body.previous_response_id)
    if previous is not None and previous.response()["status"] == "in_progress":
        text = "the response is still being created: continue it once it has ended, or cancel it"
        raise invalid(text, "previous_response_id", "previous_response_in_progress")
    try:
        return server.responses.conversation(_namespace(request), body.previous_response_id, max_bytes)
    except OverflowError:
        text = f"the conversation has more than {max_bytes} bytes, this server's limit for a request: shorten it"
        raise invalid(text, "previous_response_id") from None
    except KeyError as error:
        name = str(error.args[0])[:80]
        text = f"the response {name!r} is not stored here: send the whole conversation as input"
        raise invalid(text, "previous_response_id", "previous_response_not_found") from None


def _stored(server: Server, request: Request) -> StoredResponse:
    response_id = str(request.path_params["response_id"])
    stored = server.responses.get(_namespace(request), response_id)
    if stored is None:
        text = f"there is no response {response_id[:80]!r}: it was never stored, or is stored no longer"
        raise HttpError(404, text, code="not_found", param="response_id")
    return stored


def _namespace(request: Request) -> str:
    """Responses of one key are invisible to the others."""
    return call_of(request.scope).client.namespace

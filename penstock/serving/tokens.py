"""`/tokenize`, `/detokenize`, and `/inference/v1/generate`: token ids in, token ids out.

The last one is for trainers, verifiers and routers that hold token ids themselves. It has vLLM's field names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from penstock.api.prompt import Prompt
from penstock.api.protocols import Tokenizing
from penstock.outputs import Logprob
from penstock.sampling import SamplingParams
from penstock.serving.body import Listed, RequestModel, read_model
from penstock.serving.chat_request import TemplateFields
from penstock.serving.chat_task import REGULAR_ENDS, prepare, tool_use
from penstock.serving.endpoint import Exchange
from penstock.serving.errors import HttpError, invalid
from penstock.serving.generation import Generation, usage_of
from penstock.serving.json_response import json_response
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.sampling_fields import MAX_INT, SamplingFields, TokenId
from penstock.serving.server import Server
from penstock.serving.sse import frame
from penstock.serving.structure_fields import StructureFields
from penstock.serving.usage import usage_json


class TokenizeRequest(TemplateFields):
    """A text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Listed[dict[str, object]] | None = None
    tools: Listed[dict[str, object]] | None = None
    add_special_tokens: bool | None = True


class DetokenizeRequest(RequestModel):
    """Token ids."""

    model: str | None = None
    tokens: Listed[TokenId]


class SamplingObject(SamplingFields, StructureFields):
    """The parameters of `GenerateRequest`, nested as in vLLM."""

    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: int | None = Field(None, ge=0, le=MAX_INT)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_INT)


class GenerateRequest(RequestModel):
    """Token ids and parameters."""

    model: str | None = None
    token_ids: Listed[TokenId] = Field(min_length=1)
    sampling_params: SamplingObject = Field(default_factory=lambda: SamplingObject.model_validate({}))
    stream: bool | None = False


async def tokenize(server: Server, request: Request) -> Response:
    """The ids of a text or a chat."""
    body = await read_model(request, TokenizeRequest, server.settings.max_body_bytes)
    server.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("pass either prompt or messages", "prompt")
    prompt: Prompt = {"prompt": body.prompt} if body.messages is None else _chat(server, body, body.messages)
    ids = (
        []
        if body.prompt == ""
        else await _tokenizing(server).tokenize(prompt, add_special_tokens=body.add_special_tokens is not False)
    )
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": server.max_model_len, "token_strs": None})


def _chat(server: Server, body: TokenizeRequest, messages: Sequence[Mapping[str, object]]) -> Prompt:
    """The chat, with its tools where a completion would have them."""
    use = tool_use(body.tools, None, max_tools=server.settings.max_tools)
    return prepare(body.chat(messages), SamplingParams(), server.formats, use=use).prompt


async def detokenize(server: Server, request: Request) -> Response:
    """The text of ids."""
    body = await read_model(request, DetokenizeRequest, server.settings.max_body_bytes)
    server.check_model(body.model)
    return json_response({"prompt": await _tokenizing(server).detokenize(body.tokens)})


async def generate(server: Server, request: Request) -> Response:
    """Generate from token ids."""
    exchange = Exchange.begin(server, request, "gen-")
    body = await read_model(request, GenerateRequest, server.settings.max_body_bytes)
    exchange.check_model(body.model)
    fields, top = body.sampling_params, body.sampling_params.logprobs
    if body.stream and fields.prompt_logprobs is not None:
        raise invalid("prompt_logprobs cannot be streamed: leave stream out", "sampling_params.prompt_logprobs")
    params = fields.params(
        server.settings,
        base=server.defaults,
        max_tokens=fields.max_tokens,
        logprobs=top,
        prompt_logprobs=fields.prompt_logprobs,
        structured_outputs=fields.structure(),
    )
    generation = await exchange.submit([body.token_ids], params, fields.options(exchange.call.client))
    if body.stream:
        return exchange.stream(generation, _frames(exchange.id, generation, top))
    (output,) = await exchange.outputs(generation)
    choices = [
        _choice(
            out.index,
            out.token_ids,
            None if out.logprobs is None else chat_logprobs(out.token_ids, out.logprobs, top or 0),
        )
        | {"finish_reason": out.finish_reason, "stop_reason": out.stop_reason}
        for out in output.outputs
    ]
    scored = None if output.prompt_logprobs is None else [_scores(entry) for entry in output.prompt_logprobs]
    usage = usage_json(usage_of([output]))
    return json_response({"request_id": exchange.id, "choices": choices, "prompt_logprobs": scored, "usage": usage})


async def _frames(name: str, generation: Generation, top: int | None) -> AsyncIterator[bytes]:
    async for _, delta in generation.deltas():
        reason = delta.finish_reason if delta.finish_reason in REGULAR_ENDS else None  # another end is an error
        if not (delta.token_ids or reason):
            continue
        logprobs = None if top is None else chat_logprobs(delta.token_ids, delta.logprobs, top)
        choice = _choice(delta.index, delta.token_ids, logprobs)
        end = {"finish_reason": reason, "stop_reason": delta.stop_reason if reason else None}
        yield frame({"request_id": name, "choices": [choice | end]})


def _choice(index: int, ids: Iterable[int], logprobs: Mapping[str, object] | None) -> dict[str, object]:
    return {"index": index, "token_ids": list(ids), "logprobs": logprobs}


def _scores(entry: Mapping[int, Logprob] | None) -> dict[str, object] | None:
    """The log probabilities at one position of the prompt, by token id."""
    if entry is None:
        return None
    return {
        str(token): {"logprob": value.logprob, "rank": value.rank, "decoded_token": value.decoded_token}
        for token, value in entry.items()
    }


def _tokenizing(server: Server) -> Tokenizing:
    if not isinstance(server.engine, Tokenizing):
        raise HttpError(501, "this engine does not tokenize")
    return server.engine

"""`/v1/embeddings`: the embeddings of texts or token ids, as lists of numbers or base64 of little-endian float32."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from penstock.api.prompt import Prompt
from penstock.api.protocols import Embedder
from penstock.errors import RequestAborted
from penstock.outputs import EmbeddingOutput
from penstock.serving.body import Listed, read_model
from penstock.serving.completion_request import listed_prompts
from penstock.serving.endpoint import Exchange
from penstock.serving.errors import HttpError, invalid
from penstock.serving.json_response import json_response
from penstock.serving.sampling_fields import MAX_INT, OptionFields
from penstock.serving.server import Server
from penstock.serving.settings import ServingSettings
from penstock.serving.sse import cancelled_on_disconnect


class EmbeddingRequest(OptionFields):
    """`input` is a text, token ids, or a list of either. `pooling` and `normalize` are extensions."""

    input: str | Listed[int] | Listed[str] | Listed[Listed[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1, le=MAX_INT)
    user: str | None = None
    pooling: Literal["mean", "last"] | None = "mean"
    normalize: bool | None = True

    def prompts(self, settings: ServingSettings) -> list[Prompt]:
        """The inputs as the engine takes them. Raises `HttpError`."""
        prompts = listed_prompts(self.input)
        if not prompts or not all(prompts):
            raise invalid("the input is empty: pass at least one character or token id", "input")
        if len(prompts) > settings.max_embeddings:
            limit = settings.max_embeddings
            raise invalid(f"{len(prompts)} inputs are more than this server allows ({limit})", "input")
        return [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]


async def embeddings(server: Server, request: Request) -> Response:
    """Embed texts."""
    exchange = Exchange.begin(server, request, "embd-")
    body = await read_model(request, EmbeddingRequest, server.settings.max_body_bytes)
    model, options = exchange.check_model(body.model), body.options(exchange.call.client)
    if not isinstance(server.engine, Embedder):
        raise HttpError(404, "this engine gives no embeddings", code="not_found")
    adapter = server.adapter_of(model)
    embed = partial(server.engine.embed, adapter=adapter) if adapter else server.engine.embed
    work = embed(
        body.prompts(server.settings),
        pooling=body.pooling or "mean",
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        namespace=options.namespace,
        priority=options.priority,
        deadline=options.deadline,
    )
    outputs = await _watched(exchange, work)
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    exchange.call.facts["prompt_tokens"] = num_tokens
    encode = _base64 if body.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": encode(output.embedding)}
        for index, output in enumerate(outputs)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return json_response({"object": "list", "data": data, "model": model, "usage": usage})


async def _watched(exchange: Exchange, work: Coroutine[object, object, list[EmbeddingOutput]]) -> list[EmbeddingOutput]:
    """The result. The work ends if the client leaves, or an administrator aborts it."""
    task = asyncio.ensure_future(work)

    def cancel() -> None:
        task.cancel()

    with exchange.server.lifecycle.abortable(cancel, exchange.id, exchange.call.id):
        async with cancelled_on_disconnect(exchange.request.receive, cancel):
            await asyncio.wait([task])
        if task.cancelled():
            raise RequestAborted("the request was aborted")
    return task.result()


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

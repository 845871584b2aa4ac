"""LoRA adapters over HTTP: `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, whose names are models to requests.

The routes are vLLM's, and prime-rl's without /v1; they need the admin key, as `/admin` does. Folders are on the machine
of the server.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from penstock.api.protocols import Engine, WithAdapters
from penstock.serving.body import RequestModel, read_model
from penstock.serving.errors import HttpError, invalid
from penstock.serving.json_response import json_response
from penstock.serving.server import Server

PATHS = frozenset(f"{prefix}/{verb}_lora_adapter" for prefix in ("", "/v1") for verb in ("load", "unload"))


class LoadAdapterRequest(RequestModel, extra="forbid"):
    """A folder that peft wrote, and the model name of its requests. A name that is loaded gets the new matrices.

    `load_inplace` is vLLM's word for that and needs not be set.
    """

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = True


class UnloadAdapterRequest(RequestModel, extra="forbid"):
    """The name of an adapter; `lora_int_id` is vLLM's and means nothing here."""

    lora_name: str
    lora_int_id: int | None = None


async def load_adapter(server: Server, request: Request) -> Response:
    """Load an adapter, or replace it; requests that run keep the matrices that they began with."""
    body = await read_model(request, LoadAdapterRequest, server.settings.max_body_bytes)
    engine, name = _with_adapters(server.engine), body.lora_name
    if name in server.names:
        raise invalid(f"{name[:200]!r} is the name of the model: give the adapter another", "lora_name")
    if not body.load_inplace and name in engine.adapters:
        raise invalid(f"adapter {name[:200]!r} is loaded already: leave load_inplace out to replace it", "lora_name")
    await engine.load_adapter(name, Path(body.lora_path))
    return json_response({"status": "ok", "lora_name": name, "generation": engine.adapter_generation(name)})


async def unload_adapter(server: Server, request: Request) -> Response:
    """Forget an adapter: new requests get a 404, those that run go on."""
    body = await read_model(request, UnloadAdapterRequest, server.settings.max_body_bytes)
    engine, name = _with_adapters(server.engine), body.lora_name
    if name not in engine.adapters:
        raise HttpError(404, f"no adapter {name[:200]!r} is loaded", code="not_found", param="lora_name")
    await engine.unload_adapter(name)
    return json_response({"status": "ok", "lora_name": name})


def _with_adapters(engine: Engine) -> WithAdapters:
    if not isinstance(engine, WithAdapters):
        raise HttpError(501, "this engine takes no adapters")
    return engine

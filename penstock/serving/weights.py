"""Weight updates, pauses and sleep over HTTP, by the routes of vLLM and prime-rl: `/update_weights`, `/pause`, ...

Need the admin key, as `/admin` does. `mode` is a query parameter: what becomes of requests, as in
`InferenceEngine.updating`. A call that does not fit the engine's state is a 409.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from pydantic import AliasChoices, Field
from starlette.requests import Request
from starlette.responses import Response

from penstock.api.protocols import Trainable
from penstock.api.weights import SleepLevel, UpdateMode
from penstock.serving.body import RequestModel, read_model
from penstock.serving.errors import HttpError
from penstock.serving.json_response import json_response
from penstock.serving.readiness import status_of
from penstock.serving.server import Server

PATHS = frozenset({"/update_weights", "/pause", "/resume", "/is_paused", "/sleep", "/wake_up", "/is_sleeping"})
_LEVELS = {"1": "all", "2": "discard"}  # vLLM's numbers


class UpdateRequest(RequestModel, extra="forbid"):
    """A folder that `save_pretrained` wrote, on the server's machine; None: the live module was changed already.

    `weight_path`, `model_name` and `weight_type` are the words of the service clients. A field of another name is
    refused: ignoring it would be reported as an update, with the old weights.
    """

    weight_dir: str | None = Field(None, validation_alias=AliasChoices("weight_dir", "weight_path"))
    model_name: str | None = None
    weight_type: Literal["full"] = "full"


async def update_weights(server: Server, request: Request) -> Response:
    """Give the model new weights between two steps; requests go on under them unless `mode` says otherwise."""
    body = await read_model(request, UpdateRequest, server.settings.max_body_bytes, default=b"{}")
    source = None if body.weight_dir is None else Path(body.weight_dir)
    version = await _trainable(server).update_weights(source, mode=_mode(request, "keep"))
    return json_response({"status": "ok", "weight_version": version})


async def pause(server: Server, request: Request) -> Response:
    """Run no step until `/resume`; new requests wait."""
    await _trainable(server).pause(_mode(request, "abort"))
    return json_response({"status": "paused"})


async def resume(server: Server, request: Request) -> Response:
    """Let the steps go on."""
    await _trainable(server).resume()
    return json_response({"status": "resumed"})


async def is_paused(server: Server, request: Request) -> Response:
    """Whether a pause holds."""
    return json_response({"is_paused": _status(server) == "paused"})


async def sleep(server: Server, request: Request) -> Response:
    """Release memory until `/wake_up`: `level` is "cache", "weights", "all" (vLLM's 1) or "discard" (vLLM's 2)."""
    level = request.query_params.get("level", "all")
    await _trainable(server).sleep(cast(SleepLevel, _LEVELS.get(level, level)), mode=_mode(request, "abort"))
    return json_response({"status": "sleeping"})


async def wake_up(server: Server, request: Request) -> Response:
    """Take the memory back and serve again."""
    await _trainable(server).wake()
    return json_response({"status": "awake"})


async def is_sleeping(server: Server, request: Request) -> Response:
    """Whether the engine sleeps."""
    return json_response({"is_sleeping": _status(server) == "asleep"})


def _trainable(server: Server) -> Trainable:
    if not isinstance(server.engine, Trainable):
        raise HttpError(501, "the weights of this engine cannot be changed while it serves")
    return server.engine


def _mode(request: Request, default: UpdateMode) -> UpdateMode:
    return cast(UpdateMode, request.query_params.get("mode", default))  # the engine refuses unknown ones


def _status(server: Server) -> str:
    _trainable(server)
    return status_of(server.stats())

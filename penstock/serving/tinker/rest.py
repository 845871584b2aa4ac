"""What the SDK's `RestClient` asks for: saved weights and sessions."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response

from penstock.errors import RequestError
from penstock.serving.body import read_model
from penstock.serving.json_response import json_response
from penstock.serving.server import Server
from penstock.serving.tinker.access import PREFIX, Routes, owner_of, service_of
from penstock.serving.tinker.checkpoints import TYPES, Saved, WeightsPath, bytes_of
from penstock.serving.tinker.requests import WeightsInfo

MAX_LISTED = 1000


async def list_checkpoints(server: Server, request: Request) -> Response:
    """The saved weights of one model."""
    saved = service_of(server).checkpoints.of_run(request.path_params["run_id"], owner_of(request))
    return json_response({"checkpoints": await to_thread.run_sync(_listed, saved)})


async def list_all_checkpoints(server: Server, request: Request) -> Response:
    """All saved weights, in pages."""
    checkpoints, owner = service_of(server).checkpoints, owner_of(request)
    limit, offset = _number(request, "limit", 100), _number(request, "offset", 0)

    def listed() -> list[dict[str, object]]:
        return _listed(pair for run in checkpoints.runs() for pair in checkpoints.of_run(run, owner))

    everything = await to_thread.run_sync(listed)
    cursor = {"offset": offset, "limit": limit, "total_count": len(everything)}
    return json_response({"checkpoints": everything[offset : offset + limit], "cursor": cursor})


async def delete_checkpoint(server: Server, request: Request) -> Response:
    """Delete saved weights. What samples from them goes on, as long as the engine holds them."""
    path = WeightsPath(*(request.path_params[name] for name in ("run_id", "kind", "name")))
    service_of(server).checkpoints.delete(path, owner_of(request))
    return Response(status_code=204)


async def weights_info(server: Server, request: Request) -> Response:
    """What saved weights are."""
    body = await read_model(request, WeightsInfo, server.settings.max_body_bytes)
    info = service_of(server).checkpoints.find(WeightsPath.parse(body.tinker_path), owner_of(request)).info
    layers = {name: getattr(info, name) for name in ("train_attn", "train_mlp", "train_unembed")}
    return json_response({"base_model": info.base_model, "is_lora": True, "lora_rank": info.rank, **layers})


async def list_sessions(server: Server, request: Request) -> Response:
    """The open sessions, the newest first."""
    limit, offset = _number(request, "limit", 20), _number(request, "offset", 0)
    sessions = service_of(server).sessions.owned(owner_of(request))
    return json_response({"sessions": [session.id for session in sessions[offset : offset + limit]]})


async def get_session(server: Server, request: Request) -> Response:
    """The models and samplers of a session."""
    session = service_of(server).sessions.get(request.path_params["session_id"], owner_of(request))
    metadata = session.user_metadata and {name: str(value) for name, value in session.user_metadata.items()}
    return json_response(
        {
            "training_run_ids": list(session.runs),
            "sampler_ids": list(session.samplers),
            "user_metadata": metadata,
            "display_name": session.display_name,
        }
    )


def _listed(pairs: Iterable[tuple[WeightsPath, Saved]]) -> list[dict[str, object]]:
    """The newest first."""
    return [_described(*pair) for pair in sorted(pairs, key=lambda pair: -pair[1].info.created)]


def _described(path: WeightsPath, saved: Saved) -> dict[str, object]:
    info = saved.info
    return {
        "checkpoint_id": f"{path.kind}/{path.name}",
        "checkpoint_type": TYPES[path.kind],
        "time": _time(info.created),
        "tinker_path": str(path),
        "size_bytes": bytes_of(saved.folder),
        "public": False,
        "user_metadata": info.user_metadata,
        "expires_at": None if info.expires is None else _time(info.expires),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise RequestError(f"{name} must be a number from 0 on")
    return min(int(text), MAX_LISTED) if name == "limit" else int(text)


ROUTES: Routes = (
    ("GET", f"{PREFIX}/training_runs/{{run_id}}/checkpoints", list_checkpoints, None),
    ("DELETE", f"{PREFIX}/training_runs/{{run_id}}/checkpoints/{{kind}}/{{name}}", delete_checkpoint, None),
    ("GET", f"{PREFIX}/checkpoints", list_all_checkpoints, None),
    ("POST", f"{PREFIX}/weights_info", weights_info, WeightsInfo),
    ("GET", f"{PREFIX}/sessions", list_sessions, None),
    ("GET", f"{PREFIX}/sessions/{{session_id}}", get_session, None),
)

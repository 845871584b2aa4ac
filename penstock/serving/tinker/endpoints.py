"""The routes of the Tinker SDK, `/api/v1/...`: bodies in, futures and answers out.

An endpoint reads its body, asks the service, and answers at once; `retrieve_future` waits. Errors have FastAPI's shape.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from penstock.errors import RequestError
from penstock.serving.body import RequestModel, read_body, read_model
from penstock.serving.errors import HttpError
from penstock.serving.gate import call_of
from penstock.serving.json_response import json_response
from penstock.serving.server import Server
from penstock.serving.tinker import models, rest, sampling
from penstock.serving.tinker import requests as bodies
from penstock.serving.tinker.access import PREFIX, Routes, owner_of, service_of
from penstock.serving.tinker.futures import PROTOBUF
from penstock.serving.tinker.wire import LossRequest

M = TypeVar("M", bound=RequestModel)
POLL_S = 25.0  # how long an answer is waited for; the SDK gives up after 45


async def client_config(server: Server, request: Request) -> Response:
    """How the SDK is to behave: keys as they are, chunks one after the other, bodies within this server's limit."""
    limit = server.settings.max_body_bytes
    return json_response(
        {
            **{"pjwt_auth_enabled": False, "credential_default_source": "api_key", "use_pyqwest_transport": True},
            **{"parallel_fwdbwd_chunks": False, "proto_compress_fwdbwd": False, "custom_loss_server_side": False},
            **{"fwdbwd_max_chunk_len": 1024, "fwdbwd_max_chunk_bytes_count": limit // 2},
            **{"sample_use_retrieve_futures": False, "sample_join_sampling_session": False},
            "sample_max_concurrent_requests": max(1, server.settings.max_concurrent_requests // 2),
        }
    )


async def dynamic_config(server: Server, request: Request) -> Response:
    """What the SDK asks for again from time to time: that it tells when a sample is no longer wanted."""
    return json_response({"refresh_interval_sec": 3600, "sample_cancel_enabled": True})


async def health(server: Server, request: Request) -> Response:
    """The service is there."""
    return json_response({"status": "ok"})


async def telemetry(server: Server, request: Request) -> Response:
    """The SDK's telemetry, which is read and dropped."""
    await read_body(request, server.settings.max_body_bytes)
    return json_response({"status": "accepted"})


async def capabilities(server: Server, request: Request) -> Response:
    """The base model, by every name that it has."""
    names = dict.fromkeys((service_of(server).base_model, *server.names))
    facts = {"max_context_length": server.max_model_len, "trainable": True, "sampleable": True}
    return json_response({"supported_models": [{"model_name": name, **facts} for name in names]})


async def create_session(server: Server, request: Request) -> Response:
    """A new session."""
    body = await _read(server, request, bodies.CreateSession)
    service = service_of(server)
    await service.end_expired()
    session = service.sessions.create(owner_of(request), body.user_metadata, body.display_name)
    service.watch()
    return json_response({"type": "create_session", "session_id": session.id})


async def heartbeat(server: Server, request: Request) -> Response:
    """A sign of life. 410 once the session has ended."""
    body = await _read(server, request, bodies.Heartbeat)
    service = service_of(server)
    service.sessions.get(body.session_id, owner_of(request))
    await service.end_expired()
    return json_response({"type": "session_heartbeat"})


async def finish_session(server: Server, request: Request) -> Response:
    """End a session; one that has ended already stays so."""
    await read_body(request, server.settings.max_body_bytes)
    service, session_id = service_of(server), request.path_params["session_id"]
    if not service.sessions.has_ended(session_id):
        await service.end(service.sessions.get(session_id, owner_of(request)))
    return Response(status_code=204)


async def create_model(server: Server, request: Request) -> Response:
    """A new adapter to train."""
    body = await _read(server, request, bodies.CreateModel)
    service = service_of(server)
    base_model = service.check_base_model(body.base_model, server.names)
    request_id, run = models.create_model(service, owner_of(request), body, base_model)
    return _future(request_id, run.id)


async def get_info(server: Server, request: Request) -> Response:
    """What is known of a model in training."""
    body = await _read(server, request, bodies.ModelRequest)
    return json_response(models.info_of(service_of(server), owner_of(request), body))


async def forward_backward(server: Server, request: Request) -> Response:
    """Losses, and their gradients unless only the forward pass is asked for. The body is a protobuf message."""
    if PROTOBUF not in request.headers.get("content-type", ""):
        raise RequestError(f"the body must be a protobuf message ({PROTOBUF}), as version 0.38 of the SDK sends it")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError("compressed bodies are not read: send it as it is")
    loss = LossRequest(await read_body(request, server.settings.max_body_bytes))
    return _future(models.compute(service_of(server), owner_of(request), loss), loss.model_id)


async def optim_step(server: Server, request: Request) -> Response:
    """A step of the optimizer."""
    body = await _read(server, request, bodies.OptimStep)
    return _future(models.optim_step(service_of(server), owner_of(request), body), body.model_id)


async def save_weights(server: Server, request: Request) -> Response:
    """Save what training goes on from."""
    body = await _read(server, request, bodies.SaveWeights)
    return _future(models.save_weights(service_of(server), owner_of(request), body), body.model_id)


async def save_weights_for_sampler(server: Server, request: Request) -> Response:
    """Save what is sampled from."""
    body = await _read(server, request, bodies.SaveWeights)
    return _future(models.save_for_sampler(service_of(server), owner_of(request), body), body.model_id)


async def load_weights(server: Server, request: Request) -> Response:
    """Go on from saved weights, in this model or in a new one."""
    body = await _read(server, request, bodies.LoadWeights)
    return _future(*models.load_weights(service_of(server), owner_of(request), body, server.names))


async def create_sampling_session(server: Server, request: Request) -> Response:
    """Sample from saved weights, or from the base model."""
    body = await _read(server, request, bodies.CreateSamplingSession)
    sampler = sampling.create_sampler(service_of(server), owner_of(request), body, server.names)
    return json_response({"type": "create_sampling_session", "sampling_session_id": sampler.id})


async def asample(server: Server, request: Request) -> Response:
    """Samples, and what is asked about the prompt."""
    body = await _read(server, request, bodies.Sample)
    sampling.check_limits(body, server.settings)
    namespace = call_of(request.scope).client.namespace
    request_id, sequences = sampling.sample(service_of(server), owner_of(request), body, namespace)
    return json_response({"request_id": request_id, "sample_sequence_ids": sequences})


async def retrieve_future(server: Server, request: Request) -> Response:
    """The answer to an earlier request: waits for it, and says 408 where the client is to ask again."""
    body = await _read(server, request, bodies.FutureRequest)
    futures, call = service_of(server).futures, call_of(request.scope)
    waiting = asyncio.create_task(futures.wait(body.request_id, call.client.name, POLL_S))
    try:
        with server.lifecycle.abortable(partial(_cancel, waiting), call.id):
            (answer,) = await asyncio.gather(waiting, return_exceptions=True)
    finally:
        waiting.cancel()
    if isinstance(answer, asyncio.CancelledError):
        raise HttpError(503, "the server is shutting down", code="draining", retry_after_s=5)
    if isinstance(answer, BaseException):
        raise answer
    if answer is None:
        fields = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return json_response(fields, 408)
    return Response(answer.body, media_type=answer.media_type)


async def cancel_future(server: Server, request: Request) -> Response:
    """End the work of a sample that nobody waits for."""
    body = await _read(server, request, bodies.FutureRequest)
    service_of(server).futures.cancel(body.request_id, owner_of(request))
    return Response(status_code=204)


async def get_sampler(server: Server, request: Request) -> Response:
    """What is known of a sampling session."""
    sampler = service_of(server).sessions.sampler(request.path_params["sampler_id"], owner_of(request))
    fields = {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.path}
    return json_response(fields)


async def _read(server: Server, request: Request, model: type[M]) -> M:
    return await read_model(request, model, server.settings.max_body_bytes, default=b"{}")


def _cancel(task: asyncio.Task[object]) -> None:
    task.cancel()


def _future(request_id: str, model_id: str) -> Response:
    return json_response({"request_id": request_id, "model_id": model_id})


ROUTES: Routes = (
    ("GET", f"{PREFIX}/healthz", health, None),
    ("POST", f"{PREFIX}/client/config", client_config, bodies.ClientConfig),
    ("POST", f"{PREFIX}/client/dynamic_config", dynamic_config, bodies.ClientConfig),
    ("POST", f"{PREFIX}/telemetry", telemetry, None),
    ("GET", f"{PREFIX}/get_server_capabilities", capabilities, None),
    ("POST", f"{PREFIX}/create_session", create_session, bodies.CreateSession),
    ("POST", f"{PREFIX}/session_heartbeat", heartbeat, bodies.Heartbeat),
    ("POST", f"{PREFIX}/sessions/{{session_id}}/finish", finish_session, None),
    ("POST", f"{PREFIX}/create_model", create_model, bodies.CreateModel),
    ("POST", f"{PREFIX}/get_info", get_info, bodies.ModelRequest),
    ("POST", f"{PREFIX}/forward_backward", forward_backward, None),
    ("POST", f"{PREFIX}/optim_step", optim_step, bodies.OptimStep),
    ("POST", f"{PREFIX}/save_weights", save_weights, bodies.SaveWeights),
    ("POST", f"{PREFIX}/save_weights_for_sampler", save_weights_for_sampler, bodies.SaveWeights),
    ("POST", f"{PREFIX}/load_weights", load_weights, bodies.LoadWeights),
    ("POST", f"{PREFIX}/create_sampling_session", create_sampling_session, bodies.CreateSamplingSession),
    ("POST", f"{PREFIX}/asample", asample, bodies.Sample),
    ("POST", f"{PREFIX}/retrieve_future", retrieve_future, bodies.FutureRequest),
    ("POST", f"{PREFIX}/cancel_future", cancel_future, bodies.FutureRequest),
    ("GET", f"{PREFIX}/samplers/{{sampler_id}}", get_sampler, None),
    *rest.ROUTES,
)

"""Chat over plain ASGI. `uvicorn --app-dir examples --lifespan on web_service:app`; `curl -N localhost:8000 -d Hi`."""

from typing import Any

from asgi import read_body, send_error, send_events, send_text
from disconnect import cancelled_on_disconnect
from penstock import InferenceEngine, PenstockError, SamplingParams
from shutdown import closed_by_signals
from sse import events, first_delta

PARAMS = SamplingParams(max_tokens=64)
DEADLINE_S = 30.0


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Route by path. The engine runs as long as the server."""
    if scope["type"] == "lifespan":
        await receive()
        async with InferenceEngine() as scope["state"]["engine"], closed_by_signals(scope["state"]["engine"]):
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["path"] == "/health":
        status = scope["state"]["engine"].get_stats()["engine_status"]
        await send_text(send, 200 if status == "running" else 503, status)
    else:
        await chat(scope["state"]["engine"], receive, send)


async def chat(engine: InferenceEngine, receive: Any, send: Any) -> None:
    """The body is the question; the answer is a stream of server-sent events."""
    messages = [{"role": "user", "content": await read_body(receive)}]
    try:
        handle = engine.generate(messages, PARAMS, deadline=DEADLINE_S)
        async with cancelled_on_disconnect(handle, receive):
            first = await first_delta(handle)
            await send_events(send, events(first, handle))
    except PenstockError as error:
        await send_error(send, error)

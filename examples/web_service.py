"""Embed the engine in an ASGI web service. Run it with `uvicorn web_service:app`; as a script it sends one request."""

import asyncio
from typing import Any

from penstock import InferenceEngine, SamplingParams


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer a POST, whose body is the prompt, with server-sent events. The engine runs as long as the server."""
    message = await receive()
    if scope["type"] == "lifespan":
        async with InferenceEngine() as scope["state"]["engine"]:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    leaving = asyncio.create_task(receive())  # done when the client disconnects
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    async for delta in scope["state"]["engine"].generate(message["body"].decode(), SamplingParams(max_tokens=32)):
        if leaving.done():
            break  # drops the handle, which aborts the request
        event = "data: " + delta.text.replace("\n", "\ndata: ") + "\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
    await send({"type": "http.response.body"})


async def main() -> None:
    state, server, client, started = dict[str, Any](), *(asyncio.Queue[Any]() for _ in range(3))
    async with asyncio.TaskGroup() as group:
        group.create_task(app({"type": "lifespan", "state": state}, server.get, started.put))
        await server.put({"type": "lifespan.startup"})
        print(await started.get())
        await client.put({"type": "http.request", "body": b"class Queue:\n"})
        await app({"type": "http", "state": state}, client.get, lambda message: asyncio.to_thread(print, message))
        await server.put({"type": "lifespan.shutdown"})


if __name__ == "__main__":
    asyncio.run(main())

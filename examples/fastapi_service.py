"""Chat over FastAPI, streaming or not: `uvicorn --app-dir examples fastapi_service:app`, then localhost:8000/docs."""

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from disconnect import cancelled_on_disconnect
from fastapi_app import app
from penstock import InferenceEngine, RequestHandle, SamplingParams
from sse import events, first_delta


class Question(BaseModel):
    messages: list[dict[str, str]]
    max_tokens: int = 64
    deadline_s: float = 30.0

    def submit(self, engine: InferenceEngine) -> RequestHandle:
        return engine.generate(self.messages, SamplingParams(max_tokens=self.max_tokens), deadline=self.deadline_s)


@app.post("/chat")
async def chat(question: Question, request: Request) -> dict[str, str]:
    """The whole answer at once."""
    handle = question.submit(request.state.engine)
    async with cancelled_on_disconnect(handle, request.receive):
        return {"text": (await handle).text}


@app.post("/stream")
async def stream(question: Question, request: Request) -> StreamingResponse:
    """The answer as server-sent events."""
    handle = question.submit(request.state.engine)
    async with cancelled_on_disconnect(handle, request.receive):
        first = await first_delta(handle)
    return StreamingResponse(events(first, handle), media_type="text/event-stream")  # ends when the client leaves

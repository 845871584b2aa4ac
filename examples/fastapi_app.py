"""A FastAPI app that owns an engine: its life, a health check, and a status for each of its errors."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from penstock import EngineOverloaded, InferenceEngine, PenstockError
from shutdown import closed_by_signals


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, InferenceEngine]]:
    async with InferenceEngine() as engine, closed_by_signals(engine):  # or open streams keep the server from ending
        yield {"engine": engine}  # `request.state.engine` in handlers


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health(request: Request) -> JSONResponse:
    status = request.state.engine.get_stats()["engine_status"]
    return JSONResponse({"status": status}, 200 if status == "running" else 503)


@app.exception_handler(PenstockError)
async def answer_error(request: Request, error: PenstockError) -> JSONResponse:
    """400 for a refused prompt, 429 for a full queue, 503 for a stopped engine, 504 for a missed deadline."""
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if isinstance(error, EngineOverloaded) else None
    return JSONResponse({"error": str(error)}, error.http_status, headers)

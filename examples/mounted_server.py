"""OpenAI's API inside a FastAPI app that uses the same engine: `uvicorn --app-dir examples mounted_server:app`."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header

from penstock import InferenceEngine, SamplingParams
from penstock.serving import app as serving_app
from shutdown import closed_by_signals

engine = InferenceEngine()
requests_of: Counter[str] = Counter()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine, closed_by_signals(engine):  # the program's own: a mounted app neither starts nor stops it
        yield


def count(x_tenant: Annotated[str, Header()] = "nobody") -> None:  # a dependency, called for every request of the API
    requests_of[x_tenant] += 1


app = FastAPI(lifespan=lifespan)
app.mount("/llm", serving_app(engine, dependencies=[Depends(count)]))  # OpenAI(base_url="http://.../llm/v1")


@app.get("/tenants")
async def tenants() -> dict[str, int]:
    return requests_of


@app.post("/complete")
async def complete(text: str) -> str:
    """A route of the program, batched with the requests of the API."""
    return (await engine.generate(text, SamplingParams(max_tokens=16))).text

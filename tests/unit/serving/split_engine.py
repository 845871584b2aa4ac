"""An engine that writes a given text, cut into deltas at given places, for tests of how a server reads its output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Self

from starlette.testclient import TestClient

from penstock.outputs import CompletionOutput, Delta, Logprob, RequestOutput
from penstock.serving import ServingSettings, app

THINKING_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}{{ tools }}<think></think><tool_call>"
)


class SplitHandle:
    """A request of `SplitEngine`."""

    prompt = "what falls?"
    prompt_token_ids = (1, 2, 3, 4, 5)

    def __init__(self, engine: SplitEngine, request_id: str) -> None:
        self.request_id = request_id
        self._engine = engine

    async def admitted(self) -> None: ...

    def cancel(self) -> None:
        self._engine.num_cancels += 1

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._output().__await__()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas()

    async def _output(self) -> RequestOutput:
        if self._engine.error is not None:
            raise self._engine.error
        engine, text = self._engine, "".join(self._engine.chunks)
        completion = CompletionOutput(
            *(0, text, list(map(ord, text)), 0.0, list(map(_entry, text)), engine.finish_reason, engine.stop_reason)
        )
        return RequestOutput("r", self.prompt, list(self.prompt_token_ids), [completion], True, num_cached_tokens=2)

    async def _deltas(self) -> AsyncIterator[Delta]:
        engine = self._engine
        for text in engine.chunks:
            await asyncio.sleep(0)
            yield Delta("r", 0, text, tuple(map(ord, text)), tuple(map(_entry, text)))
        if engine.error is not None:
            raise engine.error
        yield Delta("r", finish_reason=engine.finish_reason, stop_reason=engine.stop_reason)


class SplitEngine:
    """Answers every request with `chunks`, one delta each; every character is a token. Keeps what it was asked."""

    def __init__(self, template: str = THINKING_TEMPLATE) -> None:
        self.tokenizer = SimpleNamespace(chat_template=template)
        self.chunks: Sequence[str] = ()
        self.finish_reason = "stop"
        self.stop_reason: str | int | None = None
        self.error: Exception | None = None
        self.num_cancels = 0
        self.prompts: list[Any] = []
        self.params: list[Any] = []

    def generate(self, prompt: Any, params: Any = None, *, request_id: str = "", **options: Any) -> Any:
        self.prompts.append(prompt)
        self.params.append(params)
        return SplitHandle(self, request_id)

    async def tokenize(self, prompt: Any, *, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, prompt["prompt"] if "prompt" in prompt else str(prompt["messages"])))

    async def detokenize(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))

    def abort(self, request_id: str) -> None: ...

    def start(self) -> None: ...

    def stop(self, drain: float = 30.0) -> None: ...

    def get_stats(self) -> dict[str, object]:
        return {"model": "split", "max_sequence_length": 4096}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None: ...


@contextmanager
def split_client(
    engine: SplitEngine | None = None, settings: ServingSettings | None = None
) -> Iterator[tuple[TestClient, SplitEngine]]:
    """A client of an app around a `SplitEngine`."""
    engine = engine or SplitEngine()
    with TestClient(app(engine, settings), raise_server_exceptions=False) as client:  # type: ignore[arg-type]
        yield client, engine


def cut(text: str, places: Sequence[int]) -> list[str]:
    """The text in pieces, cut at these places."""
    ends = sorted({place for place in places if 0 < place < len(text)})
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def named_events(response: Any) -> list[dict[str, Any]]:
    """The data of server-sent events; each has its own type as its name."""
    import json

    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    result = []
    for block in response.text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            result.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {result[-1]['type']}"
    return result


def _entry(character: str) -> dict[int, Logprob]:
    return {ord(character): Logprob(-0.5, 1, character)}

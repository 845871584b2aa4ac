"""An app around a scripted engine, for tests of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

from penstock import InferenceEngine, ScriptedModel
from penstock.serving import ServingSettings, app
from tests.scripted_engine import replying_engine
from tests.tokenizers_for_tests import byte_level

TEXT = "water falls "
CHAT = {"messages": [{"role": "user", "content": "what falls?"}], "max_tokens": 6}


@contextmanager
def replying(
    replies: Any, template: str | None = None, settings: ServingSettings | None = None
) -> Iterator[TestClient]:
    """A client of an app whose model gives these replies, over a tokenizer with this chat template."""
    with replying_engine(replies, template) as engine, TestClient(app(engine, settings)) as client:
        yield client


@contextmanager
def client_of(settings: ServingSettings | None = None, step_s: float = 0.0, **engine: Any) -> Iterator[TestClient]:
    """A client of an app whose model repeats `TEXT`; `client.app.state` has the server and the model."""
    tokenizer = byte_level()
    model = ScriptedModel(tokenizer.encode(TEXT, add_special_tokens=False), step_s=step_s)
    options = {"batch_timeout_ms": 0, "max_sequence_length": 512, **engine}
    native = InferenceEngine(model, tokenizer, **options)
    native.start()
    try:
        api = app(native, settings)
        api.state.model = model
        with TestClient(api, raise_server_exceptions=False) as client:
            yield client
    finally:
        model.release()
        native.stop(drain=0)


def events(response: Any) -> list[Any]:
    """The data of server-sent events; the last is "[DONE]" after a regular end."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    texts = [block.removeprefix("data: ") for block in blocks]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]

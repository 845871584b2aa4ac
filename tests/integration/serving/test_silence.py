"""A stream is never silent for long, also while the text of a call is held back."""

from __future__ import annotations

import json

from penstock import InferenceEngine
from penstock.serving import ServingSettings, app
from tests.http_sockets import Connection, running
from tests.scripted_engine import HoldingModel
from tests.tokenizers_for_tests import byte_level

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_a_stream_shows_life_while_the_text_of_a_call_is_held_back() -> None:
    """Proxies cut connections that say nothing; nothing of a call can be said before its name is complete."""
    tokenizer = byte_level()
    text = "<tool_call>" + " " * 200
    model = HoldingModel(tokenizer.encode(text, add_special_tokens=False), hold_at=20)
    engine = InferenceEngine(model, tokenizer, batch_timeout_ms=0, max_sequence_length=8192)
    engine.start()
    settings = ServingSettings(tool_format="hermes", ping_interval_s=0.02)
    try:
        with running(app(engine, settings)) as server:
            connection = Connection(server.servers[0].sockets[0].getsockname()[1])
            request = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "stream": True}
            body = json.dumps({**request, "max_tokens": 100, "ignore_eos": True}).encode()
            connection.send_head("POST", "/v1/chat/completions", len(body))
            connection.send(body)
            connection.read_head()
            chunks: list[bytes] = []
            while b"".join(chunks).count(b": ping") < 4:  # some may come before the first token
                chunks.append(connection.read_chunk())
            model.release()
            frames = b"".join([*chunks, *iter(connection.read_chunk, b"")]).split(b"\n\n")
            connection.close()
    finally:
        model.release()
        engine.stop(drain=0)
    contents = [i for i, frame in enumerate(frames) if frame.startswith(b"data: {")]
    role, held = contents[0], contents[1]
    assert frames[role + 1 : held].count(b": ping") >= 2
    assert frames[-2:] == [b"data: [DONE]", b""]

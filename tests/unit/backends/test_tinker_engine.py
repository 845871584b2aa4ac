"""`TinkerEngine` over a client that answers as a service might."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from penstock import SamplingParams
from penstock.backends import TinkerEngine


class FullContext:
    """A service whose context has room for so many tokens of a completion."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.num_calls = 0

    async def sample(self, prompt: object, num_samples: int, params: Any, **options: object) -> Any:
        self.num_calls += 1
        assert self.num_calls < 10, "it is asked without end"
        count = min(params.max_tokens, self.room)
        self.room -= count
        tokens, values = [7] * count, [-1.0] * count
        return SimpleNamespace(
            sequences=[SimpleNamespace(tokens=tokens, logprobs=values, stop_reason="length", topk_logprobs=None)]
        )


@pytest.mark.parametrize("room", [0, 6, 8])
async def test_a_completion_ends_where_the_context_of_the_service_is_full(room: int) -> None:
    """A service that had no room for another token was asked for one again and again."""
    async with TinkerEngine(FullContext(room), piece=4) as engine:
        output = await engine.generate([5, 6], SamplingParams(max_tokens=20))
    (completion,) = output.outputs
    assert (completion.token_ids, completion.finish_reason) == ([7] * room, "length")

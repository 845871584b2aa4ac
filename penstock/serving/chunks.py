"""`Chunks`: the frames of a chat or a text completion: choices under one head, with usage where it is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace

from penstock.serving.body import RequestModel
from penstock.serving.generation import Generation
from penstock.serving.sse import frame
from penstock.serving.usage import usage_json


class StreamOptions(RequestModel):
    """What a stream says about usage: in a last chunk, or in every chunk as well."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Chunks:
    """Turns the choices of a stream into frames."""

    def __init__(
        self,
        head: Mapping[str, object],
        options: StreamOptions | None,
        generation: Generation,
        reasoning_tokens: Callable[[], Awaitable[int]] | None = None,
    ) -> None:
        self._head = head
        self._generation = generation
        self._reasoning_tokens = reasoning_tokens
        self._has_usage = options is not None and options.include_usage
        self._is_continuous = self._has_usage and options is not None and options.continuous_usage_stats

    async def frames(self, choices: AsyncIterator[Mapping[str, object]]) -> AsyncIterator[bytes]:
        """A frame per choice, and one with the usage of the whole."""
        async for choice in choices:
            chunk = {**self._head, "choices": (choice,)}
            if self._has_usage:
                chunk["usage"] = usage_json(self._generation.usage()) if self._is_continuous else None
            yield frame(chunk)
        if self._has_usage:
            usage = await self._generation.final_usage()
            if self._reasoning_tokens is not None:
                usage = replace(usage, reasoning_tokens=await self._reasoning_tokens())
            yield frame({**self._head, "choices": [], "usage": usage_json(usage)})

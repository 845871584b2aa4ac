"""`Chunks`: the frames of a chat or a text completion: choices under one head, with usage where it is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import replace

from pydantic_core import to_json

from penstock.outputs import Delta
from penstock.serving.body import RequestModel
from penstock.serving.generation import Generation
from penstock.serving.sse import frame
from penstock.serving.usage import usage_json


class StreamOptions(RequestModel):
    """What a stream says about usage: in a last chunk, or in every chunk as well."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


Choice = Mapping[str, object]
# The choices that a delta of the prompt with this number becomes.
ChoicesOf = Callable[[int, Delta], Iterable[Choice]]


class Chunks:
    """Turns the choices of a stream into frames, whose constant part is encoded once."""

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
        self._has_usage = options is not None and bool(options.include_usage)
        self._is_continuous = self._has_usage and options is not None and bool(options.continuous_usage_stats)
        self._before = b'data: %b,"choices":[' % to_json(head).removesuffix(b"}")
        self._after = b'],"usage":null}\n\n' if self._has_usage else b"]}\n\n"

    async def frames(self, first: Iterable[Choice], choices_of: ChoicesOf) -> AsyncIterator[bytes]:
        """A frame per choice, those of one delta together, and one with the usage of the whole."""
        if data := b"".join(map(self._frame, first)):
            yield data
        async for number, delta in self._generation.deltas():
            if data := b"".join(map(self._frame, choices_of(number, delta))):
                yield data
        if self._has_usage:
            usage = await self._generation.final_usage()
            if self._reasoning_tokens is not None:
                usage = replace(usage, reasoning_tokens=await self._reasoning_tokens())
            yield frame({**self._head, "choices": [], "usage": usage_json(usage)})

    def _frame(self, choice: Choice) -> bytes:
        if self._is_continuous:
            return frame({**self._head, "choices": (choice,), "usage": usage_json(self._generation.usage())})
        return b"%b%b%b" % (self._before, to_json(choice, inf_nan_mode="null"), self._after)

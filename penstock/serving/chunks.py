"""`Chunks`: the frames of a chat or a text completion: choices under one head, with usage where it is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import replace

from pydantic_core import to_json

from penstock.outputs import Delta
from penstock.serving.body import RequestModel
from penstock.serving.generation import Generation, Usage
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
    """Turns the choices of a stream into frames, whose constant part is encoded once.

    With `hides_output` the usage counts no completion tokens, as of a request that only scores its prompt.
    """

    def __init__(
        self,
        head: Mapping[str, object],
        options: StreamOptions | None,
        generation: Generation,
        reasoning_tokens: Callable[[], Awaitable[int]] | None = None,
        *,
        hides_output: bool = False,
    ) -> None:
        self._head = head
        self._generation = generation
        self._reasoning_tokens = reasoning_tokens
        self._hides_output = hides_output
        self._has_usage = options is not None and bool(options.include_usage)
        self._is_continuous = self._has_usage and options is not None and bool(options.continuous_usage_stats)
        self._before = b'data: %b,"choices":[' % to_json(head).removesuffix(b"}")
        self._after = b'],"usage":null}\n\n' if self._has_usage else b"]}\n\n"

    async def frames(
        self, first: Iterable[Choice], choices_of: ChoicesOf, **first_values: object
    ) -> AsyncIterator[bytes]:
        """A frame per choice, those of one delta together, and one with the usage of the whole.

        `first_values` stand beside the choices of the first frames.
        """
        if data := b"".join(self._frame(choice, **first_values) for choice in first):
            yield data
        async for number, delta in self._generation.deltas():
            if data := b"".join(map(self._frame, choices_of(number, delta))):
                yield data
        if self._has_usage:
            usage = self._shown(await self._generation.final_usage())
            if self._reasoning_tokens is not None:
                usage = replace(usage, reasoning_tokens=await self._reasoning_tokens())
            yield frame({**self._head, "choices": [], "usage": usage_json(usage)})

    def _shown(self, usage: Usage) -> Usage:
        return replace(usage, completion_tokens=0) if self._hides_output else usage

    def _frame(self, choice: Choice, **values: object) -> bytes:
        if self._is_continuous or values:
            usage = usage_json(self._shown(self._generation.usage())) if self._is_continuous else None
            values |= {"choices": (choice,), **({"usage": usage} if self._has_usage else {})}
            return frame({**self._head, **values})
        return b"%b%b%b" % (self._before, to_json(choice, inf_nan_mode="null"), self._after)
